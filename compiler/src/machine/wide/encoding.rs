//! The vector instructions of the two wide machines, as a table.

use iced_x86::Code::{self, *};

use super::program::{MemoryForm, View};

/// The vector extension that code is assembled for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Isa {
    /// 256 bits, 16 registers.
    Avx2,
    /// 512 bits, 32 registers.
    Avx512,
}

impl Isa {
    /// Bytes of a vector.
    pub(super) const fn vector_bytes(self) -> usize {
        match self {
            Self::Avx2 => 32,
            Self::Avx512 => 64,
        }
    }

    /// How a whole vector is named.
    pub(super) const fn view(self) -> View {
        match self {
            Self::Avx2 => View::Ymm,
            Self::Avx512 => View::Zmm,
        }
    }

    /// How the lower half of a vector is named.
    pub(super) const fn half(self) -> View {
        match self {
            Self::Avx2 => View::Xmm,
            Self::Avx512 => View::Ymm,
        }
    }

    /// Number of vector registers.
    pub(super) const fn registers(self) -> usize {
        match self {
            Self::Avx2 => 16,
            Self::Avx512 => 32,
        }
    }
}

/// One row of the table for one machine.
#[derive(Clone, Copy, Debug)]
pub(super) struct Encoding {
    pub(super) code: Code,
    /// Whether the two operands may change places.
    pub(super) commutes: bool,
    pub(super) memory: MemoryForm,
}

macro_rules! operations {
    ($($(#[$doc:meta])* $name:ident: $avx2:ident, $avx512:ident, $commutes:literal, $memory:ident;)*) => {
        /// A vector instruction of two operands, or of one and an immediate byte.
        #[derive(Clone, Copy, Debug, PartialEq, Eq)]
        pub(super) enum Operation { $($(#[$doc])* $name,)* }

        impl Operation {
            pub(super) const fn encoding(self, isa: Isa) -> Encoding {
                let (avx2, avx512, commutes, memory) = match self {
                    $(Self::$name => ($avx2, $avx512, $commutes, MemoryForm::$memory),)*
                };
                match isa {
                    Isa::Avx512 => Encoding { code: avx512, commutes, memory },
                    Isa::Avx2 => Encoding { code: avx2, commutes, memory: memory.without_splat() },
                }
            }
        }
    };
}

operations! {
    // Operation: AVX2, AVX-512, whether it commutes, what its last operand may be in memory.
    And: VEX_Vpand_ymm_ymm_ymmm256, EVEX_Vpandd_zmm_k1z_zmm_zmmm512b32, true, VectorOrSplat32;
    Add8: VEX_Vpaddb_ymm_ymm_ymmm256, EVEX_Vpaddb_zmm_k1z_zmm_zmmm512, true, Vector;
    Sub8: VEX_Vpsubb_ymm_ymm_ymmm256, EVEX_Vpsubb_zmm_k1z_zmm_zmmm512, false, Vector;
    Min8: VEX_Vpminub_ymm_ymm_ymmm256, EVEX_Vpminub_zmm_k1z_zmm_zmmm512, true, Vector;
    Or: VEX_Vpor_ymm_ymm_ymmm256, EVEX_Vpord_zmm_k1z_zmm_zmmm512b32, true, VectorOrSplat32;
    Xor: VEX_Vpxor_ymm_ymm_ymmm256, EVEX_Vpxord_zmm_k1z_zmm_zmmm512b32, true, VectorOrSplat32;
    AddSaturating8: VEX_Vpaddusb_ymm_ymm_ymmm256, EVEX_Vpaddusb_zmm_k1z_zmm_zmmm512, true, Vector;
    Add16: VEX_Vpaddw_ymm_ymm_ymmm256, EVEX_Vpaddw_zmm_k1z_zmm_zmmm512, true, Vector;
    Sub16: VEX_Vpsubw_ymm_ymm_ymmm256, EVEX_Vpsubw_zmm_k1z_zmm_zmmm512, false, Vector;
    Add32: VEX_Vpaddd_ymm_ymm_ymmm256, EVEX_Vpaddd_zmm_k1z_zmm_zmmm512b32, true, VectorOrSplat32;
    Sub32: VEX_Vpsubd_ymm_ymm_ymmm256, EVEX_Vpsubd_zmm_k1z_zmm_zmmm512b32, false, VectorOrSplat32;
    ShiftLeft16: VEX_Vpsllw_ymm_ymm_imm8, EVEX_Vpsllw_zmm_k1z_zmmm512_imm8, false, No;
    ShiftRight16: VEX_Vpsrlw_ymm_ymm_imm8, EVEX_Vpsrlw_zmm_k1z_zmmm512_imm8, false, No;
    ShiftLeft32: VEX_Vpslld_ymm_ymm_imm8, EVEX_Vpslld_zmm_k1z_zmmm512b32_imm8, false, No;
    ShiftRightSigned32: VEX_Vpsrad_ymm_ymm_imm8, EVEX_Vpsrad_zmm_k1z_zmmm512b32_imm8, false, No;
    Multiply32: VEX_Vpmulld_ymm_ymm_ymmm256, EVEX_Vpmulld_zmm_k1z_zmm_zmmm512b32, true, VectorOrSplat32;
    MultiplyAddBytes: VEX_Vpmaddubsw_ymm_ymm_ymmm256, EVEX_Vpmaddubsw_zmm_k1z_zmm_zmmm512, false, Vector;
    MultiplyAddWords: VEX_Vpmaddwd_ymm_ymm_ymmm256, EVEX_Vpmaddwd_zmm_k1z_zmm_zmmm512, true, Vector;
    ShuffleBytes: VEX_Vpshufb_ymm_ymm_ymmm256, EVEX_Vpshufb_zmm_k1z_zmm_zmmm512, false, Vector;
    UnpackLow8: VEX_Vpunpcklbw_ymm_ymm_ymmm256, EVEX_Vpunpcklbw_zmm_k1z_zmm_zmmm512, false, Vector;
    UnpackHigh8: VEX_Vpunpckhbw_ymm_ymm_ymmm256, EVEX_Vpunpckhbw_zmm_k1z_zmm_zmmm512, false, Vector;
    UnpackLow16: VEX_Vpunpcklwd_ymm_ymm_ymmm256, EVEX_Vpunpcklwd_zmm_k1z_zmm_zmmm512, false, Vector;
    UnpackHigh16: VEX_Vpunpckhwd_ymm_ymm_ymmm256, EVEX_Vpunpckhwd_zmm_k1z_zmm_zmmm512, false, Vector;
    UnpackLow32: VEX_Vpunpckldq_ymm_ymm_ymmm256, EVEX_Vpunpckldq_zmm_k1z_zmm_zmmm512b32, false, Vector;
    UnpackHigh32: VEX_Vpunpckhdq_ymm_ymm_ymmm256, EVEX_Vpunpckhdq_zmm_k1z_zmm_zmmm512b32, false, Vector;
    UnpackLow64: VEX_Vpunpcklqdq_ymm_ymm_ymmm256, EVEX_Vpunpcklqdq_zmm_k1z_zmm_zmmm512b64, false, Vector;
    UnpackHigh64: VEX_Vpunpckhqdq_ymm_ymm_ymmm256, EVEX_Vpunpckhqdq_zmm_k1z_zmm_zmmm512b64, false, Vector;
    /// 128-bit parts of two vectors in another order, as the immediate says.
    Permute128: VEX_Vperm2i128_ymm_ymm_ymmm256_imm8, EVEX_Vshufi64x2_zmm_k1z_zmm_zmmm512b64_imm8, false, No;
    /// 32-bit lanes in another order within every 128 bits, as the immediate says.
    Permute32Within: VEX_Vpshufd_ymm_ymmm256_imm8, EVEX_Vpshufd_zmm_k1z_zmmm512b32_imm8, false, No;
    /// 64-bit lanes in another order: as the immediate says for AVX2, as the first operand says for AVX-512.
    Permute64: VEX_Vpermq_ymm_ymmm256_imm8, EVEX_Vpermq_zmm_k1z_zmm_zmmm512b64, false, No;
    /// 16-bit lanes to bytes, in turns of 64 bits of either operand.
    PackUnsigned16: VEX_Vpackuswb_ymm_ymm_ymmm256, EVEX_Vpackuswb_zmm_k1z_zmm_zmmm512, false, No;
    AddFloat: VEX_Vaddps_ymm_ymm_ymmm256, EVEX_Vaddps_zmm_k1z_zmm_zmmm512b32_er, true, VectorOrSplat32;
    MultiplyFloat: VEX_Vmulps_ymm_ymm_ymmm256, EVEX_Vmulps_zmm_k1z_zmm_zmmm512b32_er, true, VectorOrSplat32;
    DivideFloat: VEX_Vdivps_ymm_ymm_ymmm256, EVEX_Vdivps_zmm_k1z_zmm_zmmm512b32_er, false, VectorOrSplat32;
    SquareRootFloat: VEX_Vsqrtps_ymm_ymmm256, EVEX_Vsqrtps_zmm_k1z_zmmm512b32_er, false, No;
    /// The first operand if it is greater, else the second.
    LargerFloat: VEX_Vmaxps_ymm_ymm_ymmm256, EVEX_Vmaxps_zmm_k1z_zmm_zmmm512b32_sae, false, VectorOrSplat32;
    /// To 32-bit integers, ties to even.
    RoundFloat: VEX_Vcvtps2dq_ymm_ymmm256, EVEX_Vcvtps2dq_zmm_k1z_zmmm512b32_er, false, No;
    /// 16-bit lanes of the lower half to 32 bits, zeros coming in.
    Widen16: VEX_Vpmovzxwd_ymm_xmmm128, EVEX_Vpmovzxwd_zmm_k1z_ymmm256, false, No;
    /// The same, copies of the sign coming in.
    WidenSigned16: VEX_Vpmovsxwd_ymm_xmmm128, EVEX_Vpmovsxwd_zmm_k1z_ymmm256, false, No;
    /// Signed bytes of half a vector to 16 bits.
    WidenSigned8: VEX_Vpmovsxbw_ymm_xmmm128, EVEX_Vpmovsxbw_zmm_k1z_ymmm256, false, No;
    /// 128 bits of a vector, as the immediate says.
    Extract128: VEX_Vextracti128_xmmm128_ymm_imm8, EVEX_Vextracti32x4_xmmm128_k1z_zmm_imm8, false, No;
    /// The upper half.
    UpperHalf: VEX_Vextracti128_xmmm128_ymm_imm8, EVEX_Vextracti64x4_ymmm256_k1z_zmm_imm8, false, No;
    /// A whole vector from memory.
    Load: VEX_Vmovdqu_ymm_ymmm256, EVEX_Vmovdqu32_zmm_k1z_zmmm512, false, No;
    /// 16 bytes from memory, in every 128 bits.
    LoadSplat128: VEX_Vbroadcasti128_ymm_m128, EVEX_Vbroadcasti32x4_zmm_k1z_m128, false, No;
    /// 4 bytes from memory, in every 32 bits.
    LoadSplat32: VEX_Vpbroadcastd_ymm_xmmm32, EVEX_Vpbroadcastd_zmm_k1z_xmmm32, false, No;
    /// A whole vector to memory.
    Store: VEX_Vmovdqu_ymmm256_ymm, EVEX_Vmovdqu32_zmmm512_k1z_zmm, false, No;
    /// 128 bits of a vector to memory, as the immediate says.
    Store128: VEX_Vextracti128_xmmm128_ymm_imm8, EVEX_Vextracti32x4_xmmm128_k1z_zmm_imm8, false, No;
    /// The lowest 4 bytes to memory.
    StoreLow32: VEX_Vmovd_rm32_xmm, EVEX_Vmovd_rm32_xmm, false, No;
    /// The lowest 8 bytes to memory.
    StoreLow64: VEX_Vmovlps_m64_xmm, EVEX_Vmovlps_m64_xmm, false, No;
    /// The 8 bytes after them.
    StoreNext64: VEX_Vmovhps_m64_xmm, EVEX_Vmovhps_m64_xmm, false, No;
    /// A register to another.
    Move: VEX_Vmovdqa_ymm_ymmm256, EVEX_Vmovdqa32_zmm_k1z_zmmm512, false, No;
    /// All zero, of a register and itself.
    Clear: VEX_Vpxor_ymm_ymm_ymmm256, EVEX_Vpxord_zmm_k1z_zmm_zmmm512b32, false, No;
}
