//! A schedule in words, for people who have never seen one.

use ternion_compiler::{Family, Layout, Multiply, Schedule};

/// The loops of a schedule as pseudo-code for an `[m, k]` matrix, one line each.
#[must_use]
pub fn explain(schedule: &Schedule, m: usize, k: usize) -> Vec<String> {
    let Schedule { family, layout, unroll, ntile, prefetch, .. } = *schedule;
    let mut lines = vec![
        format!("# {}", idea(family)),
        format!("# weights: {}", order(layout)),
        format!("share the {} tiles of {} rows among the threads", layout.tiles(m), layout.tile_rows()),
        format!("for each tile of {} rows:", layout.tile_rows()),
    ];
    lines.push(if ntile > 1 {
        format!("  for each {ntile} columns of activations (one pass over the tile serves all of them):")
    } else {
        "  for each column of activations:".to_owned()
    });
    lines.push(format!(
        "    walk along the row of {k} weights, {unroll} step{} per turn of the loop, {}-byte vectors:",
        if unroll == 1 { "" } else { "s" },
        schedule.machine.vector_bytes()
    ));
    if prefetch > 0 {
        lines.push(format!("      ask memory for the weights {prefetch} bytes further on"));
    }
    lines.extend(body(schedule).into_iter().map(|line| format!("      {line}")));
    lines.push("    write the sums, one 32-bit number per row and column".to_owned());
    lines
}

fn idea(family: Family) -> String {
    match family.name() {
        "mad" => "multiply and add: unpack weights of -1, 0, 1 into bytes, multiply by the activations".to_owned(),
        "tl1" => "look up: two weights are an index into a small table of ready sums; nothing is multiplied".to_owned(),
        "t5" => "multiply and add, with five weights in a byte: fewer bytes to read, more work to unpack".to_owned(),
        "vlut" => "look up for many columns: four weights pick a row of ready sums, one addition serves all columns"
            .to_owned(),
        other => other.to_owned(),
    }
}

fn order(layout: Layout) -> String {
    match layout {
        Layout::Rows { rows, chunk } => {
            format!("{chunk} bytes of each of {rows} rows in turn: one stream, {rows} sums under way")
        }
        Layout::Lanes { rows, group } => {
            format!(
                "{group} byte{} of each of {rows} rows in turn: each lane of a vector is a row of its own",
                if group == 1 { "" } else { "s" }
            )
        }
        Layout::Fives { rows } => format!("four bytes (20 weights) of each of {rows} rows in turn: each lane is a row"),
        other => other.to_string(),
    }
}

fn body(schedule: &Schedule) -> Vec<String> {
    let multiply = match schedule.multiply {
        Multiply::Pairs => "multiply bytes in pairs into 16-bit sums, widen them to 32 bits before they could overflow",
        Multiply::Dot => "multiply four bytes at once and add to the 32-bit sums, in one instruction",
    };
    let lines: &[&str] = match schedule.family.name() {
        "tl1" => &[
            "take two weights of every row: an index from 0 to 8",
            "look the sum up in the table, for all rows of a vector at once",
            "add",
        ],
        "vlut" => &[
            "take one byte of a row: four weights",
            "load that row of the table: the sums for all columns",
            "add; widen now and then",
        ],
        "t5" => &["take bytes of five weights and split them by table", multiply],
        _ => &["take bytes of four weights and split them by shift and mask", multiply],
    };
    lines.iter().map(|line| (*line).to_owned()).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_part_of_a_schedule_is_in_its_words() {
        let schedule: Schedule =
            "mad/avx2 layout=lanes16x4 multiply=dot unroll=2 ntile=4 prefetch=4096".parse().unwrap();
        let text = explain(&schedule, 640, 2560).join("\n");
        for part in
            ["40 tiles of 16 rows", "each 4 columns", "2 steps", "32-byte", "4096", "2560", "four bytes at once"]
        {
            assert!(text.contains(part), "{part} in {text}");
        }
    }
}
