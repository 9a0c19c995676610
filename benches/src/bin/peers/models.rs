//! The models that engines get, made once and kept.

use std::ops::ControlFlow;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context as _, Result, bail, ensure};
use clap::ValueEnum;
use ternion_compiler::{Cpu, Layout};
use ternion_runtime::formats::gguf::{self, TernaryType, TokenRowType};
use ternion_runtime::formats::synth::Recipe;
use ternion_runtime::formats::tern::{self, HeadType};
use ternion_runtime::formats::{Activation, Checkpoint};
use ternion_runtime::model::{KernelChoice, ready_form, request};
use ternion_runtime::team::{Team, available_threads};
use ternion_tuner::{Budget, CacheDir, choose};

use crate::engines::Weights;

/// A shape that engines are compared on.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum Shape {
    /// BitNet b1.58 2B4T.
    #[value(name = "2B-4T")]
    TwoB4T,
    /// 125M parameters.
    #[value(name = "125M")]
    Small,
}

impl Shape {
    /// Its name among the presets of made-up models.
    pub(crate) const fn name(self) -> &'static str {
        match self {
            Self::TwoB4T => "2B-4T",
            Self::Small => "125M",
        }
    }

    fn recipe(self, weights: Weights) -> Result<Recipe> {
        let mut recipe = Recipe::preset(self.name())?;
        match weights {
            Weights::Relu2Trained => {}
            Weights::Relu2Random => recipe.gate_sparsity = Some(0.5),
            _ => {
                recipe.config.activation = Activation::Silu;
                recipe.gate_sparsity = None;
            }
        }
        Ok(recipe)
    }
}

/// Where files are kept, and the Python that has llama.cpp.
pub(crate) struct Workshop {
    pub(crate) directory: PathBuf,
    pub(crate) python: PathBuf,
}

impl Workshop {
    /// The file for `weights`, made if it is not there.
    pub(crate) fn file(&self, shape: Shape, weights: Weights) -> Result<PathBuf> {
        let path = self.directory.join(format!("{}-{}.{}", shape.name(), weights.name(), weights.extension()));
        if path.exists() {
            return Ok(path);
        }
        eprintln!("making {}", path.display());
        let checkpoint = Checkpoint::synthetic(shape.recipe(weights)?)?;
        match weights {
            Weights::Relu2Trained | Weights::Relu2Random | Weights::Silu => prepare(&checkpoint, &path)?,
            Weights::I2S => export(&checkpoint, &path, TernaryType::I2S)?,
            Weights::Tq2_0 | Weights::Tq1_0 | Weights::Q4_0 => {
                let f16 = self.directory.join(format!("{}-f16.gguf", shape.name()));
                if !f16.exists() {
                    export(&checkpoint, &f16, TernaryType::F16)?;
                }
                let unfinished = path.with_extension("part");
                let mut command = Command::new(&self.python);
                command.arg(script()).arg("--quantize").args([&f16, &unfinished]).arg(weights.name());
                ensure!(command.status()?.success(), "{} could not be made", path.display());
                std::fs::rename(&unfinished, &path)?;
            }
        }
        Ok(path)
    }

    /// Removes the file that only others are made from.
    pub(crate) fn tidy(&self, shape: Shape) -> Result<()> {
        match std::fs::remove_file(self.directory.join(format!("{}-f16.gguf", shape.name()))) {
            Err(error) if error.kind() != std::io::ErrorKind::NotFound => Err(error.into()),
            _ => Ok(()),
        }
    }

    /// Builds llama.cpp for this machine in an environment of its own, unless that is there already.
    pub(crate) fn install(&self) -> Result<()> {
        let environment = self.directory.join("venv");
        if self.python.exists() {
            return Ok(());
        }
        eprintln!("building llama-cpp-python in {}: this takes some minutes", environment.display());
        run(Command::new("python3").args(["-m", "venv"]).arg(&environment))?;
        run(Command::new(&self.python).args(["-m", "pip", "install", "--quiet", "cmake", "ninja", "numpy"]))?;
        let mut pip = Command::new(&self.python);
        pip.args(["-m", "pip", "install", "--quiet", "--no-binary", "llama-cpp-python", "llama-cpp-python"]);
        run(pip.env("CMAKE_ARGS", "-DGGML_NATIVE=ON"))
    }
}

/// The Python program that runs llama.cpp.
pub(crate) fn script() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("peers/runner.py")
}

fn run(command: &mut Command) -> Result<()> {
    let status = command.status().with_context(|| format!("cannot run {}", command.get_program().display()))?;
    if !status.success() {
        bail!("{} failed: {status}", command.get_program().display());
    }
    Ok(())
}

/// Writes a prepared file that loads with nothing left to compute, as `ternion setup` does.
fn prepare(checkpoint: &Checkpoint, path: &Path) -> Result<()> {
    let cpu = Cpu::host().context("ternion emits code for x86-64 and aarch64 only")?;
    let team = Team::new(available_threads())?;
    let choices = choose(&request(checkpoint.config(), Budget::RACE), &cpu, &team, &CacheDir::default(), &|_| {})?;
    let layout = |_, _, m, k| choices.get(m, k).map_or(Layout::Canonical, |choice| choice.layout());
    let form = ready_form(checkpoint, &KernelChoice::Tuned(choices.clone()), &cpu, HeadType::Own)?;
    tern::write_with(checkpoint, path, &layout, form, &mut |_, _| ControlFlow::Continue(()))?;
    Ok(())
}

fn export(checkpoint: &Checkpoint, path: &Path, ternary: TernaryType) -> Result<()> {
    gguf::export(checkpoint, path, ternary, TokenRowType::F16, &mut |_, _| ControlFlow::Continue(()))?;
    Ok(())
}
