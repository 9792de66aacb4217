// SPDX-License-Identifier: Apache-2.0
// A guest whose first instructions write a byte to the serial port. Started through the PVH entry (32-bit protected mode).
  .code32
  .text
  .globl start
start:
  mov $0x3f8, %dx
  mov $'@', %al
  out %al, %dx
1:
  hlt
  jmp 1b

  .section .note.pvh, "a", @note
  .align 4
  .long 4, 8, 18 // name and description sizes, XEN_ELFNOTE_PHYS32_ENTRY
  .asciz "Xen"
  .quad start
