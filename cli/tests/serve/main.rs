//! `ternion serve` as its users meet it: the real program on a port of its own, spoken to over HTTP.

mod api;
mod client;
mod deploy;
mod lifecycle;
mod limits;
mod openai;
mod operation;
mod page;
mod traces;
