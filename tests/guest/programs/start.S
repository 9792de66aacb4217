// SPDX-License-Identifier: Apache-2.0
// Where a bare guest starts (64-bit Linux boot protocol: boot_params in rsi), where its interrupts come in, and where its
// other processors start.

  .section .text.start, "ax"
  .globl start
start:
  // A sign of life before anything else, for those who measure how long it takes to get here.
  movw $0x3f8, %dx
  movb $'>', %al
  outb %al, %dx
  movq $stack_top, %rsp
  movq %rsi, %rdi
  call enter_program

  .macro interrupt_entry number
interrupt_\number:
  pushq %rax
  movl $\number, %eax
  jmp interrupt
  .endm

  .text
  interrupt_entry 0
  interrupt_entry 1
  interrupt_entry 2
  interrupt_entry 3

interrupt:
  .irp register, rcx, rdx, rsi, rdi, r8, r9, r10, r11
  pushq %\register
  .endr
  movl %eax, %edi
  call handle_interrupt
  .irp register, r11, r10, r9, r8, rdi, rsi, rdx, rcx
  popq %\register
  .endr
  popq %rax
  iretq

  .section .rodata
  .balign 8
  .globl interrupt_entries
interrupt_entries:
  .quad interrupt_0, interrupt_1, interrupt_2, interrupt_3

// Copied to kTrampoline (0x30000): real mode to long mode, with the first processor's page tables and GDT.
  .globl trampoline, trampoline_end, trampoline_page_tables
  .balign 16
  .code16
trampoline:
  cli
  movw %cs, %ax
  movw %ax, %ds
  lgdtl trampoline_gdt_pointer - trampoline
  movl %cr4, %eax
  orl $0x20, %eax                // PAE
  movl %eax, %cr4
  movl trampoline_page_tables - trampoline, %eax
  movl %eax, %cr3
  movl $0xc0000080, %ecx         // EFER
  rdmsr
  orl $0x100, %eax               // LME
  wrmsr
  movl %cr0, %eax
  andl $0x9fffffff, %eax         // caches on
  orl $0x80000001, %eax          // PG, PE
  movl %eax, %cr0
  ljmpl $0x10, $0x30000 + trampoline_64 - trampoline
  .code64
trampoline_64:
  movw $0x18, %ax
  movw %ax, %ds
  movw %ax, %es
  movw %ax, %ss
  movl $1, %eax
  movq $stacks_taken, %rbx
  lock xaddl %eax, (%rbx)
  incl %eax
  shll $12, %eax
  movq $processor_stacks, %rsp
  addq %rax, %rsp
  movq $enter_processor, %rax
  call *%rax
  .balign 4
trampoline_page_tables:
  .long 0
trampoline_gdt_pointer:
  .word 0x2f
  .long 0x500                    // the GDT that `clone` made
trampoline_end:

  .bss
  .balign 16
stacks_taken:
  .long 0
  .balign 16
  .skip 16384
stack_top:
processor_stacks:
  .skip 32 * 4096

  .section .note.GNU-stack, "", @progbits
