//! Kernels as relocatable object files, for machines other than this one and for other programs' linkers.
//!
//! The code is what [`compile`](crate::compile) would place in memory, but nobody has run it: unlike a
//! [`Kernel`](crate::Kernel) it has not been checked against `kernels-ref`. Every symbol is a function
//! `void symbol(const struct kernel_args *)` in the C convention of its architecture (System V on x86-64). The record's
//! nine fields of eight bytes are those of [`Argument`](crate::machine::Argument), in that order.

use cranelift_module::{Linkage, Module, default_libcall_names};
use cranelift_object::{ObjectBuilder, ObjectModule};

use crate::compile::{in_parallel, machine_code};
use crate::machine::{Code, clif};
use crate::step_kernel::step_code;
use crate::{CompileError, Cpu, KernelSpec, MachineKind, Schedule, StepSpec};

/// Why there is no object file.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ObjectError {
    /// A kernel could not be compiled.
    #[error(transparent)]
    Kernel(#[from] CompileError),
    /// The file could not be written in its format.
    #[error("object file for {cpu}, symbol `{symbol}`: {reason}")]
    File {
        /// The CPU it is for.
        cpu: Cpu,
        /// The function at which it failed; empty if that was the file as a whole.
        symbol: String,
        /// What the writer said.
        reason: String,
    },
}

/// An ELF object file for `cpu` with one global function per `(spec, schedule, symbol)`.
///
/// # Errors
/// The first kernel that is not legal on `cpu`, or the first symbol that is given twice.
pub fn object(kernels: &[(KernelSpec, Schedule, &str)], cpu: &Cpu) -> Result<Vec<u8>, ObjectError> {
    let codes = in_parallel(kernels, |(spec, schedule, _)| machine_code(spec, schedule, cpu));
    write(kernels.iter().map(|(_, _, symbol)| *symbol).zip(codes), cpu)
}

/// As [`object`], of steps on activations by these machines. Their record has the six fields of
/// [`ActivationArgument`](crate::machine::ActivationArgument).
///
/// # Errors
/// The first step that the machine cannot carry out on `cpu`, or the first symbol that is given twice.
pub fn step_object(steps: &[(StepSpec, MachineKind, &str)], cpu: &Cpu) -> Result<Vec<u8>, ObjectError> {
    let codes = in_parallel(steps, |(spec, machine, _)| step_code(spec, *machine, cpu));
    write(steps.iter().map(|(_, _, symbol)| *symbol).zip(codes), cpu)
}

fn write<'a>(
    functions: impl Iterator<Item = (&'a str, Result<Code, CompileError>)>,
    cpu: &Cpu,
) -> Result<Vec<u8>, ObjectError> {
    let file = |symbol: &str, reason: String| ObjectError::File { cpu: *cpu, symbol: symbol.to_owned(), reason };
    let isa = clif::isa(cpu).map_err(|error| file("", error.to_string()))?;
    let builder = ObjectBuilder::new(isa, "ternion", default_libcall_names());
    let mut module = ObjectModule::new(builder.map_err(|error| file("", error.to_string()))?);
    for (symbol, code) in functions {
        let code = code?;
        let signature = module.make_signature();
        let function = module
            .declare_function(symbol, Linkage::Export, &signature)
            .map_err(|error| file(symbol, error.to_string()))?;
        module
            .define_function_bytes(function, code.alignment, &code.bytes, &[])
            .map_err(|error| file(symbol, error.to_string()))?;
    }
    module.finish().emit().map_err(|error| file("", error.to_string()))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Columns;

    const SPEC: KernelSpec = KernelSpec { k: 260, columns: Columns::One };

    fn cpu(text: &str) -> Cpu {
        text.parse().unwrap()
    }

    #[test]
    fn an_object_file_names_its_architecture_and_its_symbols() {
        for (text, machine) in [("x86-64 +sse3 +ssse3 +sse4.1", 62), ("aarch64", 183)] {
            let schedule = Schedule::candidates(&SPEC, &cpu(text))[0];
            let file = object(&[(SPEC, schedule, "first"), (SPEC, schedule, "second")], &cpu(text)).unwrap();
            // ELF, 64 bits, little-endian, relocatable; e_machine.
            assert_eq!((&file[..6], file[16], file[18]), (&b"\x7fELF\x02\x01"[..], 1, machine));
            for symbol in [&b"\0first\0"[..], b"\0second\0"] {
                assert!(file.windows(symbol.len()).any(|bytes| bytes == symbol));
            }
        }
    }

    #[test]
    fn what_cannot_be_written_is_refused_in_one_line() {
        let schedule = Schedule::candidates(&SPEC, &cpu("aarch64"))[0];
        let twice = object(&[(SPEC, schedule, "same"), (SPEC, schedule, "same")], &cpu("aarch64"));
        let dot = Schedule::candidates(&SPEC, &cpu("aarch64 +dotprod"))[0];
        let lacking = object(&[(SPEC, dot, "dot")], &cpu("aarch64"));
        for (error, words) in [(twice, "symbol `same`"), (lacking, "the dot product extension")] {
            let line = error.unwrap_err().to_string();
            assert!(line.contains(words) && !line.contains('\n'), "{line}");
        }
        assert!(object(&[], &cpu("aarch64")).is_ok());
    }
}
