//! The NBD front by itself, before one Unix socket: `scripts/bench export` measures TLS with it.
//!
//! `nbd_front TLS-DIR SOCKET`: serves the export `disk`, whoever's certificate, and prints its port.
#![allow(clippy::unwrap_used, clippy::print_stdout, reason = "a program for measurements")]

use std::{path::PathBuf, sync::Arc};

use serio_node::nbd::{Admission, serve, tls_config};
use tokio::net::TcpListener;

#[tokio::main]
async fn main() {
    let arguments: Vec<PathBuf> = std::env::args_os().skip(1).map(PathBuf::from).collect();
    let [tls, socket] = arguments.as_slice() else { panic!("usage: nbd_front TLS-DIR SOCKET") };
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    println!("{}", listener.local_addr().unwrap().port());
    let socket = socket.clone();
    let lookup = move |name: &str, _: &str| match name {
        "disk" => Admission::Export(socket.clone()),
        _ => Admission::Unknown,
    };
    serve(listener, tls_config(tls).unwrap(), Arc::new(lookup)).await;
}
