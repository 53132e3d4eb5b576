//! Watches a type of resources at a control plane over ADS and prints what comes, until it is ended.
//!
//! ```text
//! cargo run -p xds-client --example watch -- 127.0.0.1:18000 cds                  # all clusters
//! cargo run -p xds-client --example watch -- 127.0.0.1:18000 eds a b --delta      # the endpoints of two
//! ```
//!
//! It keeps the rules of a polite client: what cannot be read is refused with a reason, everything else is accepted, and
//! a stream that ends is opened again with what is known.

#![allow(clippy::print_stdout, reason = "an example's output")]

use std::io;
use std::rc::Rc;
use std::time::Duration;

use prost::Message;
use tokio::net::TcpStream;
use tokio::task::LocalSet;
use xds_client::h2::{Http2, Io};
use xds_client::{
    Client, Config, Decoded, End, Failure, Observer, Resource, Update, Variant, Watcher, types,
};

/// `envoy.config.core.v3.Node`, as much of it as a control plane needs.
#[derive(prost::Message)]
struct Node {
    #[prost(string, tag = "1")]
    id: String,
    #[prost(string, tag = "2")]
    cluster: String,
}

/// What all these types have in common: their first field is their name.
#[derive(prost::Message)]
struct Named {
    #[prost(string, tag = "1")]
    name: String,
}

/// Prints what comes.
struct Printer;

impl Watcher for Printer {
    fn decode(&self, resource: Resource) -> Result<Decoded, String> {
        let Resource { version, aliases, value, .. } = resource;
        let bytes = value.unwrap_or_default();
        let message = Named::decode(&*bytes).map_err(|error| error.to_string())?;
        if message.name.is_empty() {
            return Err("a resource without a name".to_owned());
        }
        Ok(Decoded { name: message.name.clone(), version, aliases, bytes, message: Box::new(message) })
    }

    fn update(&self, update: &Update<'_>) -> Result<(), String> {
        println!("version {:?}{}", update.version, if update.delta { ", a change" } else { "" });
        for resource in update.resources {
            println!("  {} ({} bytes, version {:?})", resource.name, resource.bytes.len(), resource.version);
        }
        for name in update.removed {
            println!("  {name} is gone");
        }
        Ok(())
    }

    fn failed(&self, why: Failure<'_>) {
        println!("nothing new: {why:?}");
    }
}

/// Prints how the stream fares.
struct Stream;

impl Observer for Stream {
    fn connected(&self, connected: bool) {
        println!("{}", if connected { "connected" } else { "not connected" });
    }

    fn closed(&self, end: &End) {
        println!("the stream ended: {end}");
    }
}

fn type_of(word: &str) -> Option<&'static str> {
    Some(match word {
        "cds" => types::CLUSTER,
        "eds" => types::ENDPOINTS,
        "lds" => types::LISTENER,
        "rds" => types::ROUTES,
        "sds" => types::SECRET,
        _ => return None,
    })
}

fn main() -> io::Result<()> {
    let usage = || io::Error::other("watch HOST:PORT cds|eds|lds|rds|sds [NAME…] [--delta]");
    let (flags, words): (Vec<_>, Vec<_>) = std::env::args().skip(1).partition(|arg| arg == "--delta");
    let [address, word, names @ ..] = words.as_slice() else { return Err(usage()) };
    let type_url = type_of(word).ok_or_else(usage)?;
    let names: Vec<_> = names.iter().map(String::as_str).collect();
    let variant = if flags.is_empty() { Variant::StateOfTheWorld } else { Variant::Delta };
    let node = Node { id: "example".to_owned(), cluster: "example".to_owned() };
    let config = Config {
        path: types::aggregated(variant).to_owned(),
        variant,
        node: node.encode_to_vec().into(),
        node_on_first_message_only: true,
        backoff: (Duration::from_millis(500), Duration::from_secs(30)),
        max_message: 0,
        rate_limit: None,
    };

    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    LocalSet::new().block_on(&runtime, async {
        let to = address.clone();
        let connect = move || {
            let to = to.clone();
            async move { Ok(Box::new(TcpStream::connect(to).await?) as Box<dyn Io>) }
        };
        let transport = Http2::new(connect, &format!("http://{address}"), Vec::new());
        let client = Client::new(config, Rc::new(transport), Rc::new(Stream));
        // It is watched for as long as this lives.
        let _watch = client.watch(type_url, &names, Rc::new(Printer), Some(Duration::from_secs(15)));
        client.start();
        std::future::pending().await
    })
}
