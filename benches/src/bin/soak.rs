//! Puts load on a running server and says what became of it, as JSON.
//!
//! `cargo run --release -p ternion-benches --bin soak -- --url http://127.0.0.1:8080 --clients 64 --seconds 300`
//!
//! The server has to be started with `--rate-limit 0`, or clients are turned away as they should be.

use std::time::Duration;

use anyhow::{Result, bail};
use clap::Parser;
use ternion_benches::soak::{Load, soak};

/// Puts load on a server: clients that ask for one story after the other.
#[derive(Debug, Parser)]
struct Arguments {
    /// Where the server is
    #[arg(long, default_value = "http://127.0.0.1:8080")]
    url: String,
    /// Its key, if it wants one
    #[arg(long)]
    key: Option<String>,
    /// Clients at the same time; may be given several times, and each number has its turn
    #[arg(long, default_value = "64")]
    clients: Vec<usize>,
    /// Seconds in which they begin new requests
    #[arg(long, default_value_t = 20.0)]
    seconds: f64,
    /// Tokens to generate with each request
    #[arg(long, default_value_t = 32)]
    tokens: usize,
    /// Temperature; 0 takes the likeliest token, which spares the head most of its work
    #[arg(long, default_value_t = 0.8)]
    temperature: f32,
}

fn main() -> Result<()> {
    let Arguments { url, key, clients, seconds, tokens, temperature } = Arguments::parse();
    let time = Duration::try_from_secs_f64(seconds)?;
    let mut failed = 0;
    for clients in clients {
        let outcome = soak(&Load {
            url: url.trim_end_matches('/').to_owned(),
            key: key.clone(),
            clients,
            time,
            tokens,
            temperature,
        })?;
        println!("{}", serde_json::to_string(&outcome)?);
        failed += outcome.failed.values().sum::<usize>();
    }
    if failed > 0 {
        bail!("{failed} requests failed");
    }
    Ok(())
}
