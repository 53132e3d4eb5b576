//! The admin interface's listener: one like any other, on the control thread, whose connection manager has Envoy's
//! settings for it and ends in a filter that answers ([`Admin`]). So HTTP/1 and HTTP/2, what is refused, the access log
//! and the stats `http.admin.*` and `listener.admin.*` are those of all listeners.
//!
//! It has a [`Server`] of its own: a drain of the process neither closes nor waits for its connections, and its clients
//! count towards no limit.

use std::rc::Rc;
use std::sync::Arc;
use std::task::{Context, Poll};

use bytes::{Bytes, BytesMut};
use envoy_types::pb::envoy::config::core::v3::{Http1ProtocolOptions, HttpProtocolOptions};
use envoy_types::pb::envoy::config::listener::v3 as pb;
use envoy_types::pb::envoy::config::listener::v3::filter::ConfigType;
use envoy_types::pb::envoy::config::listener::v3::listener::DrainType;
use envoy_types::pb::envoy::config::route::v3::RouteConfiguration;
use envoy_types::pb::envoy::extensions::filters::network::http_connection_manager::v3 as hcm;
use envoy_types::pb::google::protobuf::{Any, BoolValue, Duration};
use hcm::http_connection_manager::RouteSpecifier;
use prost::Message;
use sampan_codec::{Body, BodyError, BodyStream, Frame};
use sampan_core::{Address, ConfigResult, HeaderId, HeaderMap};
use sampan_http::filter::{HttpFilter, LocalReply, Outcome, Response, State, Step, decode};
use sampan_http::manager;
use sampan_http::stream::Stream;
use sampan_listener::{BindError, Bound, ListenerConfig, Listeners, NetworkFilterRegistry, Server, Worker};
use sampan_upstream::{Clusters, WorkerClusters};
use tokio::sync::{mpsc, oneshot};

use crate::{Admin, AdminModel, Reply, Request};

const MAX_FORM: usize = 1 << 20;

/// The listener, which exists before who answers does.
pub struct Listener {
    server: Arc<Server>,
    config: Arc<ListenerConfig>,
    inbox: mpsc::UnboundedReceiver<Asked>,
}

/// A request on its way to [`Admin`], and the answer's way back.
struct Asked {
    method: String,
    path: String,
    form: String,
    reply: oneshot::Sender<Reply>,
}

impl Listener {
    /// The listener of a model; none where it has no address. Opens no socket.
    pub fn new(model: &AdminModel, of: &Server) -> ConfigResult<Option<Self>> {
        if model.message.address.is_none() {
            return Ok(None);
        }
        let (stats, runtime, clusters) = (of.stats.clone(), of.runtime.clone(), of.clusters.clone());
        let mut server = Server::new(stats, runtime, Default::default(), of.node.clone(), clusters);
        server.access_logs = of.access_logs.clone();
        let server = Arc::new(server);
        let (ask, inbox) = mpsc::unbounded_channel();
        let mut registry = NetworkFilterRegistry::default();
        registry.register(manager::TYPE, move |any, context| {
            manager::answering(&decode(any)?, context, "admin", Arc::new(Ask(ask.clone())))
        });
        let config = ListenerConfig::from_proto(&listener(model), &server, &registry)?;
        Ok(Some(Self { server, config: Arc::new(config), inbox }))
    }

    /// Binds it, and serves it from then on. Must run where `spawn_local` works: connections are tasks of this thread.
    /// Gives the address as `--admin-address-path` writes it: with the port that was really bound.
    pub fn serve(self, admin: Rc<Admin>, clusters: Arc<Clusters>) -> Result<String, BindError> {
        let Self { server, config, mut inbox } = self;
        let bound = Bound::bind(config.clone(), 1)?;
        let address = match bound.addresses.first() {
            Some(Address::Pipe(path)) if path.starts_with('@') => String::new(),
            Some(address) => address.to_string(),
            None => String::new(),
        };
        let drain = server.drain.signal();
        let clusters = Rc::new(WorkerClusters::new(clusters));
        let listeners = Listeners::new(Rc::new(Worker::new(Worker::MAIN, server, clusters, drain)));
        for sockets in bound.listen()? {
            listeners.add(config.clone(), sockets).map_err(|e| BindError::of(&config, e))?;
        }
        tokio::task::spawn_local(async move {
            while let Some(Asked { method, path, form, reply }) = inbox.recv().await {
                // A client that is gone wants no answer; what it asked for is done.
                let _ = reply.send(admin.answer(&Request { method: &method, path: &path, form: &form }));
            }
            drop(listeners);
        });
        Ok(address)
    }
}

/// What Envoy's admin listener would look like in a configuration.
fn listener(model: &AdminModel) -> pb::Listener {
    let zero = Some(Duration::default());
    let manager = hcm::HttpConnectionManager {
        stat_prefix: "admin".to_owned(),
        route_specifier: Some(RouteSpecifier::RouteConfig(RouteConfiguration::default())),
        common_http_protocol_options: Some(HttpProtocolOptions { idle_timeout: zero, ..Default::default() }),
        http_protocol_options: Some(Http1ProtocolOptions {
            allow_absolute_url: Some(BoolValue { value: false }),
            ..Default::default()
        }),
        stream_idle_timeout: zero,
        delayed_close_timeout: zero,
        use_remote_address: Some(BoolValue { value: true }),
        generate_request_id: Some(BoolValue { value: false }),
        normalize_path: Some(BoolValue { value: true }),
        merge_slashes: true,
        access_log: model.access_log.clone(),
        ..Default::default()
    };
    let filter = pb::Filter {
        name: "admin".to_owned(),
        config_type: Some(ConfigType::TypedConfig(Any {
            type_url: format!("type.googleapis.com/{}", manager::TYPE),
            value: manager.encode_to_vec(),
        })),
    };
    pb::Listener {
        name: "admin".to_owned(),
        stat_prefix: "admin".to_owned(),
        address: model.message.address.clone(),
        socket_options: model.message.socket_options.clone(),
        filter_chains: vec![pb::FilterChain { filters: vec![filter], ..Default::default() }],
        enable_reuse_port: Some(BoolValue { value: false }),
        // `/healthcheck/fail` closes none of its connections.
        drain_type: DrainType::ModifyOnly.into(),
        ignore_global_conn_limit: true,
        bypass_overload_manager: true,
        ..Default::default()
    }
}

/// The filter in the router's place.
struct Ask(mpsc::UnboundedSender<Asked>);

impl HttpFilter for Ask {
    fn on_request<'a>(&'a self, stream: &'a mut Stream, _state: &'a mut State) -> Step<'a> {
        Step::Wait(Box::pin(self.ask(stream)))
    }
}

impl Ask {
    async fn ask(&self, stream: &mut Stream) -> Outcome {
        let mut body = BytesMut::new();
        loop {
            match stream.body.frame().await {
                None => break,
                Some(Ok(Frame::Data(data))) if body.len() + data.len() <= MAX_FORM => body.extend(data),
                Some(Ok(Frame::Data(_))) => {
                    return LocalReply::new(413, "request_payload_too_large")
                        .body("Payload Too Large")
                        .outcome();
                }
                Some(Ok(Frame::Trailers(_))) => {}
                Some(Err(_)) => return Outcome::Reset,
            }
        }
        stream.timer.set_received(body.len() as u64);
        let text = |id| stream.request.get(id).map(String::from_utf8_lossy).unwrap_or_default().into_owned();
        let method = text(HeaderId::METHOD);
        let is_form = text(HeaderId::CONTENT_TYPE).starts_with("application/x-www-form-urlencoded");
        let form =
            if is_form && method == "POST" { String::from_utf8_lossy(&body).into() } else { String::new() };
        let (reply, answer) = oneshot::channel();
        let asked = Asked { method, path: text(HeaderId::PATH), form, reply };
        // Nobody answers any more when the process ends.
        if self.0.send(asked).is_err() {
            return Outcome::Reset;
        }
        let Ok(reply) = answer.await else { return Outcome::Reset };
        stream.info.details = Some("admin_filter_response".into());
        if stream.head_request {
            // Envoy counts what it does not send.
            stream.info.bytes.sent = reply.body.len() as u64;
        }
        Outcome::Respond(Box::new(response(reply)))
    }
}

fn response(reply: Reply) -> Response {
    let mut headers = HeaderMap::new();
    headers.append(HeaderId::STATUS, reply.status.to_string());
    headers.append(HeaderId::CONTENT_TYPE, reply.content_type);
    headers.append(HeaderId::CACHE_CONTROL, "no-cache, max-age=0");
    headers.append(HeaderId::X_CONTENT_TYPE_OPTIONS, "nosniff");
    let body = Body::stream(Once(Some(reply.body.into())));
    Response { status: reply.status, headers, body, tunnel: false, local: false }
}

/// A body of one frame that does not tell its length, not even that it has none, so that it is sent chunked as Envoy
/// sends it.
struct Once(Option<Bytes>);

impl BodyStream for Once {
    fn poll_frame(&mut self, _: &mut Context<'_>) -> Poll<Option<Result<Frame, BodyError>>> {
        Poll::Ready(self.0.take().filter(|bytes| !bytes.is_empty()).map(|bytes| Ok(Frame::Data(bytes))))
    }

    fn is_end(&self) -> bool {
        false
    }
}
