//! x86-64 code as text, for reading.

use std::collections::BTreeSet;
use std::fmt::Write;

use iced_x86::{Decoder, DecoderOptions, Formatter, Instruction, IntelFormatter, OpKind};

use super::Code;

/// One instruction per line with its address, a mark where jumps land, and then the constants.
pub(crate) fn text(code: &Code) -> String {
    let instructions: Vec<_> =
        Decoder::new(64, &code.bytes[..code.instructions], DecoderOptions::NONE).iter().collect();
    let is_jump = |instruction: &Instruction| instruction.op0_kind() == OpKind::NearBranch64;
    let targets: BTreeSet<_> =
        instructions.iter().filter(|i| is_jump(i)).map(Instruction::near_branch_target).collect();
    let mut formatter = IntelFormatter::new();
    let options = formatter.options_mut();
    options.set_rip_relative_addresses(false);
    options.set_branch_leading_zeros(false);
    options.set_show_branch_size(false);
    options.set_hex_prefix("0x");
    options.set_hex_suffix("");
    options.set_uppercase_hex(false);
    options.set_space_after_operand_separator(true);
    options.set_memory_size_options(iced_x86::MemorySizeOptions::Never);
    let mut text = String::new();
    let mut line = String::new();
    for instruction in &instructions {
        line.clear();
        formatter.format(instruction, &mut line);
        let mark = if targets.contains(&instruction.ip()) { '>' } else { ' ' };
        writeln!(text, "{mark}{:04x}  {line}", instruction.ip()).expect("a string takes everything");
    }
    let constants = code.instructions.next_multiple_of(64).min(code.bytes.len());
    for (i, bytes) in code.bytes[constants..].chunks(16).enumerate() {
        let hex: Vec<_> = bytes.iter().map(|byte| format!("{byte:02x}")).collect();
        writeln!(text, " {:04x}  {}", constants + 16 * i, hex.join(" ")).expect("a string takes everything");
    }
    text
}
