// SPDX-License-Identifier: Apache-2.0
// A guest to be forked. It writes to each page from 2 MiB up to TOUCH_MIB and tells it by the byte 'W'. It then waits until it
// is another machine than it was, tells that by the byte '@' and halts. Started through the PVH entry (32-bit protected mode).
  .equ generation, 0x6020 // in the identity page (docs/fork.md)
  .code32
  .text
  .globl start
start:
  mov $0x200000, %edi
1:
  mov %edi, (%edi)
  add $0x1000, %edi
  cmp $(TOUCH_MIB << 20), %edi
  jb 1b

  mov generation, %ebx
  mov $0x3f8, %dx
  mov $'W', %al
  out %al, %dx
  mov $'@', %al
2:
  cmp generation, %ebx
  je 2b
  out %al, %dx
3:
  hlt
  jmp 3b

  .section .note.pvh, "a", @note
  .align 4
  .long 4, 8, 18 // name and description sizes, XEN_ELFNOTE_PHYS32_ENTRY
  .asciz "Xen"
  .quad start
