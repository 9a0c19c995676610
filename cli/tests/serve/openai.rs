//! The `openai` package of Python, unchanged: where `TERNION_OPENAI_PYTHON` names a Python that has
//! what `server/tests/requirements.txt` lists.

use std::process::Command;

use crate::client::Server;

#[test]
fn the_openai_package_works_unchanged() {
    let Some(python) = std::env::var_os("TERNION_OPENAI_PYTHON") else {
        println!("skipped: TERNION_OPENAI_PYTHON names no Python with the openai package");
        return;
    };
    let server = Server::start(&[]);
    let script = concat!(env!("CARGO_MANIFEST_DIR"), "/../server/tests/openai_client.py");
    let output = Command::new(python).arg(script).arg(format!("http://{}/v1", server.address)).output();
    let output = output.expect("the interpreter runs");
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
}
