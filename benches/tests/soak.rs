//! The soak on a server in this process, for seconds instead of minutes.

use std::net::SocketAddr;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::channel;
use std::time::Duration;

use ternion_benches::soak::{Load, Outcome, soak};
use ternion_compiler::{Cpu, Family};
use ternion_runtime::formats::Checkpoint;
use ternion_runtime::model::{KernelChoice, KvType, Model};
use ternion_runtime::team::Team;
use ternion_server::engine::EngineOptions;
use ternion_server::{App, Limits, Offer, Options};

/// Puts a load on a server with the embedded model.
fn soaked(options: Options, engine: EngineOptions, clients: usize) -> Outcome {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../assets/ternary-tales.tern");
    let checkpoint = Checkpoint::open(&path).expect("the embedded model");
    let cpu = Cpu::host().expect("a CPU that ternion compiles for");
    let team = Arc::new(Team::new(2).expect("threads"));
    let model = Model::load(&checkpoint, &KernelChoice::Family(Family::Mad), &cpu, &*team, &|_| {}).expect("it loads");
    let offer = Offer::new("tales".to_owned(), &checkpoint, Arc::new(model), team).expect("it can be served");
    let app = Arc::new(App::new(options, vec![(offer, engine)]).expect("an engine"));
    let stop = AtomicBool::new(false);
    std::thread::scope(|scope| {
        let (sender, address) = channel();
        let stopped = || stop.load(Ordering::SeqCst);
        let server = scope.spawn(move || {
            let any = SocketAddr::from(([127, 0, 0, 1], 0));
            let listening = |address| sender.send(address).expect("somebody waits");
            ternion_server::run(app, any, stopped, listening, |_| {})
        });
        let url = format!("http://{}", address.recv().expect("it listens"));
        let outcome =
            soak(&Load { url, key: None, clients, time: Duration::from_secs(4), tokens: 8, temperature: 0.8 });
        stop.store(true, Ordering::SeqCst);
        assert!(server.join().expect("no panic").expect("it ran"), "everything was answered");
        outcome.expect("the server was there")
    })
}

fn engine(parallel: usize, queue: usize) -> EngineOptions {
    EngineOptions { parallel, chunk: 64, queue, prefix_bytes: 8_000_000, kv: KvType::F16, context: 256 }
}

#[test]
fn under_load_every_request_is_answered_and_memory_stays() {
    let limits = Limits { per_minute: None, ..Limits::default() };
    let outcome = soaked(Options { limits, ..Options::default() }, engine(8, 256), 32);
    assert!(outcome.failed.is_empty() && outcome.turned_away.is_empty(), "{outcome:?}");
    assert!(outcome.answered >= 32 && outcome.tokens == 8 * outcome.answered as u64, "{outcome:?}");
    assert!(outcome.memory[2] < outcome.memory[0] + 100_000_000, "{outcome:?}");
}

#[test]
fn more_than_fits_is_turned_away_with_a_time_and_nothing_fails() {
    let limits = Limits { per_minute: None, ..Limits::default() };
    let outcome = soaked(Options { limits, ..Options::default() }, engine(1, 1), 8);
    assert!(outcome.failed.is_empty(), "{outcome:?}");
    assert!(outcome.answered > 0 && outcome.turned_away.get(&503).is_some_and(|turned| *turned > 0), "{outcome:?}");
}
