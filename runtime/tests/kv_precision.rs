//! What rounding the KV cache costs, on held-out text.

mod support;

use std::sync::Arc;

use ternion_compiler::{Cpu, Family};
use ternion_runtime::model::{KernelChoice, KvType, Model, Session, SessionOptions};
use ternion_runtime::team::Team;

/// What a cache makes of a text, compared with one of `f32`.
#[derive(Debug, Default)]
struct Precision {
    /// Mean loss per token, in nats.
    loss: f64,
    /// Root of the mean squared difference of logits.
    logits: f64,
    /// Largest difference of logits.
    largest: f64,
    /// Share of positions whose most likely token is another one.
    other_choice: f64,
}

fn argmax(logits: &[f32]) -> usize {
    (0..logits.len()).fold(0, |best, i| if logits[i] > logits[best] { i } else { best })
}

/// The book's chapter on exactness has the table that this prints under `--nocapture`.
#[test]
fn f16_and_int8_cost_next_to_nothing_on_held_out_text() {
    let checkpoint = support::embedded();
    let cpu = Cpu::host().expect("a CPU that ternion compiles for");
    let team = Arc::new(Team::new(2).unwrap());
    let model = Arc::new(Model::load(&checkpoint, &KernelChoice::Family(Family::Mad), &cpu, &*team, &|_| {}).unwrap());
    let text = std::fs::read_to_string(support::fixture("val.txt")).unwrap();
    let tokens = checkpoint.tokenizer().unwrap().encode(&text, true).unwrap();
    let texts: Vec<&[u32]> = tokens.chunks_exact(model.config().context).take(8).collect();
    assert!(texts.len() > 4, "enough text to judge");

    let all_logits = |kv: KvType| -> Vec<Vec<f32>> {
        let options = SessionOptions { kv, ..SessionOptions::default() };
        let mut session = Session::new(Arc::clone(&model), Arc::clone(&team), &options).unwrap();
        let mut all = Vec::new();
        for text in &texts {
            session.truncate(0);
            session.prefill_all(text, &mut |_, logits| all.push(logits.to_vec())).unwrap();
        }
        all
    };
    let exact = all_logits(KvType::F32);
    let measure = |kv: KvType| -> Precision {
        let (mut found, mut losses, mut compared) = (Precision::default(), 0, 0);
        let mut rows = all_logits(kv).into_iter().zip(&exact);
        for text in &texts {
            for next in text[1..].iter().map(Some).chain([None]) {
                let (logits, exact) = rows.next().unwrap();
                for (found_logit, exact) in logits.iter().zip(exact) {
                    let difference = f64::from((found_logit - exact).abs());
                    found.logits += difference * difference;
                    found.largest = found.largest.max(difference);
                    compared += 1;
                }
                found.other_choice += f64::from(u8::from(argmax(&logits) != argmax(exact)));
                if let Some(next) = next {
                    let sum: f64 = logits.iter().map(|logit| f64::from(*logit).exp()).sum();
                    found.loss += sum.ln() - f64::from(logits[*next as usize]);
                    losses += 1;
                }
            }
        }
        found.loss /= f64::from(losses);
        found.logits = (found.logits / f64::from(compared)).sqrt();
        found.other_choice /= exact.len() as f64;
        found
    };
    let [f16, f32, int8] = KvType::ALL.map(measure);
    println!("{} positions", exact.len());
    for (kv, found) in KvType::ALL.iter().zip([&f16, &f32, &int8]) {
        println!("{kv}: {found:?}");
    }
    assert_eq!((f32.logits, f32.other_choice), (0.0, 0.0));
    // A rounded cache is not an exact one, or this would measure nothing.
    assert!(f16.largest > 0.0 && int8.largest > f16.largest);
    assert!((f16.loss - f32.loss).abs() < 0.002, "f16 {} f32 {}", f16.loss, f32.loss);
    assert!((int8.loss - f32.loss).abs() < 0.01, "int8 {} f32 {}", int8.loss, f32.loss);
}
