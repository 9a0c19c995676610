; ternary-gemm k=2560 n=1
; mad/avx512 layout=lanes16x4 multiply=dot unroll=1 ntile=1
; x86-64 +avx512f +avx512dq +avx512bw +avx512vl +avx512vnni
 0000  mov rsi, [rdi]
 0003  mov rdx, [rdi+0x28]
 0007  mov rcx, [rdi+8]
 000b  cmp rcx, 1
 0012  jl 0x123
 0018  nop [rax+rax]
; loop 1: tiles of rows, until none is left
>0020  mov r8, [rdi+0x10]
 0024  mov r9, [rdi+0x20]
 0028  vpxord zmm0, zmm0, zmm0
 002e  vpxord zmm1, zmm1, zmm1
 0034  vpxord zmm2, zmm2, zmm2
 003a  vpxord zmm3, zmm3, zmm3
 0040  mov r10, rsi
 0043  mov r11, 0xa0
 004a  vpbroadcastd zmm4, [0x140]
 0054  vpbroadcastd zmm5, [0x144]
 005e  vpbroadcastd zmm6, [0x148]
 0068  vpbroadcastd zmm7, [0x14c]
 0072  nop [rax+rax]
 007b  nop [rax+rax]
; loop 2: groups of k, unroll at a time, 160 turns, carries zmm0-zmm3
>0080  vmovdqu32 zmm8, [r10]
 0086  vpandd zmm9, zmm8, zmm4
 008c  vpdpbusd zmm0, zmm9, [r8]{1to16}
 0092  vpandd zmm9, zmm8, zmm5
 0098  vpdpbusd zmm1, zmm9, [r8+0x280]{1to16}
 00a2  vpandd zmm9, zmm8, zmm6
 00a8  vpdpbusd zmm2, zmm9, [r8+0x500]{1to16}
 00b2  vpandd zmm8, zmm8, zmm7
 00b8  vpdpbusd zmm3, zmm8, [r8+0x780]{1to16}
 00c2  lea r10, [r10+0x40]
 00c6  lea r8, [r8+4]
 00ca  sub r11, 1
 00ce  jne 0x80
; back to loop 2
 00d4  vpsubd zmm0, zmm0, [r9]{1to16}
 00da  vpsrad zmm1, zmm1, 2
 00e1  vpaddd zmm0, zmm0, zmm1
 00e7  vpsrad zmm1, zmm2, 4
 00ee  vpaddd zmm0, zmm0, zmm1
 00f4  vpsrad zmm1, zmm3, 6
 00fb  vpaddd zmm0, zmm0, zmm1
 0101  vmovdqu32 [rdx], zmm0
 0107  lea rsi, [rsi+0x2800]
 010e  lea rdx, [rdx+0x40]
 0112  lea rcx, [rcx-1]
 0116  cmp rcx, 1
 011d  jge 0x20
; back to loop 1
>0123  vzeroupper
 0126  ret
 0140  03 03 03 03 0c 0c 0c 0c 30 30 30 30 c0 c0 c0 c0
