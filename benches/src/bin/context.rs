//! How much of its decoding speed a model keeps at the end of a long context.
//!
//! One sequence per length is read first. Then all of them generate in turns, token by token, so that whatever else the
//! machine does hits all alike, and the median time per token of each is compared with the first's.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::Result;
use clap::Parser;
use ternion_benches::model::{load, median, read};
use ternion_runtime::model::{KvType, Session, SessionOptions};
use ternion_runtime::verify::some_tokens;

/// Decoding speed by context length and type of the KV cache
#[derive(Debug, Parser)]
struct Arguments {
    /// A prepared file
    model: PathBuf,
    /// Threads
    #[arg(short, long, value_delimiter = ',', default_values = ["1"])]
    threads: Vec<usize>,
    /// Types of the KV cache
    #[arg(long, value_name = "TYPE", value_delimiter = ',', default_values = ["f16", "int8"])]
    kv: Vec<KvType>,
    /// Context lengths in tokens; the first is what the others are compared with
    #[arg(short, long, value_name = "TOKENS", value_delimiter = ',', default_values = ["100", "4000"])]
    contexts: Vec<usize>,
    /// Tokens to generate at each length
    #[arg(short, default_value = "24")]
    n: usize,
}

fn main() -> Result<()> {
    let arguments = Arguments::parse();
    println!(
        "| threads | KV cache | context | read tokens/s | ms per token | share of the speed at {} |",
        arguments.contexts[0]
    );
    println!("|---|---|---|---|---|---|");
    for threads in arguments.threads {
        let (model, team) = load(&arguments.model, threads)?;
        for kv in &arguments.kv {
            let options = SessionOptions { kv: *kv, ..SessionOptions::default() };
            let mut sessions = Vec::new();
            for context in &arguments.contexts {
                let mut session = Session::new(Arc::clone(&model), Arc::clone(&team), &options)?;
                let start = Instant::now();
                session.read(&some_tokens(*context, model.config().vocabulary, 0))?;
                sessions.push((*context, *context as f64 / start.elapsed().as_secs_f64(), session, 0, Vec::new()));
            }
            for _ in 0..arguments.n {
                for (_, _, session, token, times) in &mut sessions {
                    let (next, time) = read(session, &[*token])?;
                    *token = next;
                    times.push(time);
                }
            }
            let mut first = None;
            for (context, speed, _, _, times) in &mut sessions {
                let time: Duration = median(times);
                let first = *first.get_or_insert(time);
                let share = first.as_secs_f64() / time.as_secs_f64();
                let time = time.as_secs_f64() * 1e3;
                println!("| {threads} | {kv} | {context} | {speed:.0} | {time:.2} | {:.1} % |", share * 100.0);
            }
        }
    }
    Ok(())
}
