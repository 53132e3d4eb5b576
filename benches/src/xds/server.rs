//! The control plane: one ADS stream in either variant, in this process, so that the time of a push is known to the microsecond.
//!
//! It serves what it has been given, answers new names, sees by type what was answered and sends what [`ControlPlane::push`] is told
//! to, whatever was sent before. It keeps no books of what the proxy has: an identical push is sent like any other.

use std::{
    collections::{BTreeMap, HashMap},
    net::SocketAddr,
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use bytes::Bytes;
use h2::{RecvStream, SendStream, server::SendResponse};
use prost::Message;
use tokio::{
    net::{TcpListener, TcpStream},
    sync::{Notify, mpsc},
};
use xds_client::{
    grpc::{Deframer, framed},
    types,
    wire::{
        Any, DeltaDiscoveryRequest, DeltaDiscoveryResponse, DiscoveryRequest, DiscoveryResponse, Resource,
        Status,
    },
};

use super::resources::Named;
use crate::error::{BenchError, Result};

/// Room for a whole first response and a whole request.
const WINDOW: u32 = 1 << 28;

/// A serving control plane. It ends with the runtime.
#[derive(Clone)]
pub struct ControlPlane {
    /// Where it listens.
    pub at: SocketAddr,
    shared: Arc<Shared>,
}

#[derive(Default)]
struct Shared {
    state: Mutex<State>,
    answered: Notify,
}

#[derive(Default)]
struct State {
    resources: HashMap<String, BTreeMap<String, Any>>,
    /// The open stream, and whether it is delta.
    stream: Option<(mpsc::UnboundedSender<Bytes>, bool)>,
    /// What was sent last and what was answered last, by type.
    kinds: HashMap<String, Kind>,
    refused: Option<String>,
    version: u64,
}

#[derive(Default)]
struct Kind {
    sent: u64,
    /// In the state of the world one answer may stand for several responses.
    answered: u64,
    /// Of the last request.
    length: usize,
}

/// What is read of a request of the state of the world that only answers: ten thousand names are passed over.
#[derive(Clone, PartialEq, prost::Message)]
struct Answer {
    #[prost(string, tag = "4")]
    type_url: String,
    #[prost(string, tag = "5")]
    response_nonce: String,
    #[prost(message, optional, tag = "6")]
    error_detail: Option<Status>,
}

impl ControlPlane {
    /// Listens, with these resources.
    pub async fn start(resources: Vec<Named>) -> Result<Self> {
        let listener = TcpListener::bind("127.0.0.1:0").await.map_err(BenchError::io("control plane"))?;
        let at = listener.local_addr().map_err(BenchError::io("control plane"))?;
        let shared = Arc::new(Shared::default());
        let this = Self { at, shared: shared.clone() };
        this.keep(&resources);
        tokio::spawn(async move {
            while let Ok((stream, _)) = listener.accept().await {
                let _ = stream.set_nodelay(true);
                let shared = shared.clone();
                // A stream that breaks is noticed as an answer that does not come.
                tokio::spawn(async move {
                    let _ = connection(stream, shared).await;
                });
            }
        });
        Ok(this)
    }

    fn keep(&self, resources: &[Named]) {
        let mut state = self.shared.lock();
        for (name, any) in resources {
            state.resources.entry(any.type_url.clone()).or_default().insert(name.clone(), any.clone());
        }
    }

    /// Sends these as one response, all of one type. Nothing is waited for.
    pub fn push(&self, resources: &[Named]) {
        self.keep(resources);
        self.shared.lock().send(resources);
    }

    /// All of a type that there are.
    pub fn all(&self, type_url: &str) -> Vec<Named> {
        self.shared.lock().all(type_url)
    }

    /// Waits until the last response of a type has its answer.
    pub async fn answered(&self, type_url: &str, limit: Duration) -> Result<()> {
        let all = async {
            loop {
                let answered = self.shared.answered.notified();
                {
                    let state = self.shared.lock();
                    if let Some(reason) = &state.refused {
                        return Err(BenchError::protocol(format!("refused: {reason}")));
                    }
                    if state
                        .kinds
                        .get(type_url)
                        .is_some_and(|kind| kind.sent > 0 && kind.sent == kind.answered)
                    {
                        return Ok(());
                    }
                }
                answered.await;
            }
        };
        let late = |_| BenchError::Subject(format!("no answer to {type_url} in {limit:?}"));
        tokio::time::timeout(limit, all).await.map_err(late)?
    }
}

impl Shared {
    fn lock(&self) -> std::sync::MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn receive(&self, message: Bytes, delta: bool) -> Result<()> {
        let broken = |e: prost::DecodeError| BenchError::protocol(format!("request: {e}"));
        let length = message.len();
        let mut state = self.lock();
        let (type_url, nonce, error, asked) = if delta {
            let request = DeltaDiscoveryRequest::decode(message).map_err(broken)?;
            let asked = request.resource_names_subscribe;
            (request.type_url, request.response_nonce, request.error_detail, asked)
        } else {
            let answer = Answer::decode(message.clone()).map_err(broken)?;
            let last = state.kinds.get(&answer.type_url).map(|kind| kind.length);
            // Versions and nonces have one length; another length is other names.
            let fresh = answer.response_nonce.is_empty() || last != Some(length);
            let asked = if fresh {
                DiscoveryRequest::decode(message).map_err(broken)?.resource_names
            } else {
                Vec::new()
            };
            (answer.type_url, answer.response_nonce, answer.error_detail, asked)
        };
        let kind = state.kinds.entry(type_url.clone()).or_default();
        let (first, more) = (kind.sent == 0, kind.length.abs_diff(length) > 64);
        kind.length = length;
        if let Some(status) = error {
            state.refused = Some(status.message);
        } else if !nonce.is_empty() {
            kind.answered = nonce.parse().unwrap_or(0);
        }
        let wanted: Vec<Named> = match state.resources.get(&type_url) {
            Some(all) if asked.is_empty() && first => {
                all.iter().map(|(n, a)| (n.clone(), a.clone())).collect()
            }
            Some(all) if delta || first || more => asked
                .iter()
                .filter_map(|name| all.get_key_value(name))
                .map(|(n, a)| (n.clone(), a.clone()))
                .collect(),
            _ => Vec::new(),
        };
        if !wanted.is_empty() {
            state.send(&wanted);
        }
        drop(state);
        self.answered.notify_waiters();
        Ok(())
    }
}

impl State {
    fn all(&self, type_url: &str) -> Vec<Named> {
        let all = self.resources.get(type_url).into_iter().flatten();
        all.map(|(name, any)| (name.clone(), any.clone())).collect()
    }

    fn send(&mut self, resources: &[Named]) {
        let Some((stream, delta)) = &self.stream else { return };
        let Some(type_url) = resources.first().map(|(_, any)| any.type_url.clone()) else { return };
        self.version += 1;
        let version = format!("{:010}", self.version);
        let bytes = if *delta {
            let one = |(name, any): &Named| Resource {
                name: name.clone(),
                version: version.clone(),
                resource: Some(any.clone()),
                ..Default::default()
            };
            framed(&DeltaDiscoveryResponse {
                resources: resources.iter().map(one).collect(),
                type_url: type_url.clone(),
                nonce: version.clone(),
                system_version_info: version,
                ..Default::default()
            })
        } else {
            framed(&DiscoveryResponse {
                resources: resources.iter().map(|(_, any)| any.clone()).collect(),
                type_url: type_url.clone(),
                nonce: version.clone(),
                version_info: version,
                ..Default::default()
            })
        };
        // A stream that is gone is noticed as an answer that does not come.
        let _ = stream.send(bytes);
        self.kinds.entry(type_url).or_default().sent = self.version;
    }
}

async fn connection(stream: TcpStream, shared: Arc<Shared>) -> Result<()> {
    let mut connection = h2::server::Builder::new()
        .initial_window_size(WINDOW)
        .initial_connection_window_size(WINDOW)
        .max_frame_size(1 << 20)
        .handshake::<_, Bytes>(stream)
        .await?;
    while let Some(accepted) = connection.accept().await {
        let (request, respond) = accepted?;
        let delta = request.uri().path() == types::aggregated(xds_client::Variant::Delta);
        let body = request.into_body();
        tokio::spawn(exchange(body, respond, delta, shared.clone()));
    }
    Ok(())
}

async fn exchange(
    mut body: RecvStream,
    mut respond: SendResponse<Bytes>,
    delta: bool,
    shared: Arc<Shared>,
) -> Result<()> {
    let (sender, mut out) = mpsc::unbounded_channel();
    {
        let mut state = shared.lock();
        let resources = std::mem::take(&mut state.resources);
        *state = State { resources, stream: Some((sender, delta)), ..State::default() };
    }
    let head = http::Response::builder().header("content-type", "application/grpc").body(());
    let head = head.map_err(|e| BenchError::protocol(e.to_string()))?;
    let mut send: SendStream<Bytes> = respond.send_response(head, false)?;
    let mut deframer = Deframer::default();
    loop {
        tokio::select! {
            bytes = out.recv() => match bytes {
                Some(bytes) => send.send_data(bytes, false)?,
                None => return Ok(()),
            },
            chunk = body.data() => {
                let Some(chunk) = chunk else { return Ok(()) };
                let chunk = chunk?;
                body.flow_control().release_capacity(chunk.len())?;
                deframer.push(chunk);
                let broken = |end: xds_client::End| BenchError::protocol(end.to_string());
                while let Some(message) = deframer.pop().map_err(broken)? {
                    shared.receive(message, delta)?;
                }
            }
        }
    }
}
