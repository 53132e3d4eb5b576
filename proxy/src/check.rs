//! `sampan check FILE…`: whether configuration would be taken, without a proxy that takes it.
//!
//! A file holds a bootstrap, a `DiscoveryResponse` (as control planes send it or as a watched file), a `DeltaDiscoveryResponse`, what
//! `/config_dump` printed, whole or in part, one resource with its `@type`, or a list of such. Each resource goes the way that one of a
//! control plane goes, so that what is said of it is what the control plane would read in the NACK.
//!
//! Clusters that routes name are looked for in all files together; where no file has one, every name is taken.
//! A folder stands for the files in it whose names say what they are, `-` for the standard input.
//! What `/config_dump` has redacted cannot be checked beyond its message: its keys are not there.

mod dump;
mod read;

use std::collections::HashSet;
use std::fmt::Write as _;
use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::Arc;

use envoy_types::pb::envoy::config::cluster::v3::Cluster;
use envoy_types::pb::envoy::config::core::v3::TypedExtensionConfig;
use envoy_types::pb::envoy::config::endpoint::v3::ClusterLoadAssignment;
use envoy_types::pb::envoy::config::listener::v3::Listener;
use envoy_types::pb::envoy::config::route::v3::{RouteConfiguration, ScopedRouteConfiguration, VirtualHost};
use envoy_types::pb::envoy::extensions::transport_sockets::tls::v3::secret::Type as SecretType;
use envoy_types::pb::envoy::extensions::transport_sockets::tls::v3::{
    CommonTlsContext, DownstreamTlsContext, SdsSecretConfig, Secret, UpstreamTlsContext, common_tls_context,
};
use envoy_types::pb::envoy::service::discovery::v3::Resource as Wrapper;
use envoy_types::pb::envoy::service::runtime::v3::Runtime as RuntimeLayer;
use envoy_types::pb::google::protobuf::Any;
use prost::{Message, Name};
use sampan_config::UnknownFields;
use sampan_core::runtime::Runtime;
use sampan_core::stats::Store;
use sampan_http::filter::{HttpFilterContext, HttpFilterRegistry};
use sampan_http::route::{RouteContext, RouteTable};
use sampan_listener::{
    FactoryContext, ListenerConfig, NetworkFilterRegistry, NodeInfo, Server, TrafficDirection,
};
use sampan_tls::{ClientContext, ServerContext, StaticSecrets};
use sampan_upstream::{ClusterConfig, ClusterManager, LoadAssignment};
use tokio::runtime::LocalRuntime;

use crate::cli::{Mode, Options};
use crate::xds::{Named, unpack};
use crate::{boot, server};

use read::{Content, read};

/// What is to be checked, and how.
#[derive(Debug, Default)]
pub struct Request {
    files: Vec<PathBuf>,
    reject_unknown: bool,
    allow_unknown_static: bool,
}

/// What was found: a line for each file or for each thing that is wrong.
#[derive(Debug, Default)]
pub struct Verdict {
    /// The lines.
    pub text: String,
    /// Whether all would be taken.
    pub good: bool,
}

const USAGE: &str =
    "usage: sampan check [--reject-unknown-dynamic-fields] [--allow-unknown-static-fields] FILE|FOLDER|-...";

/// Does what stands behind `check`; a closed pipe is nobody's error.
pub fn main(arguments: &[String]) -> ExitCode {
    if arguments.iter().any(|argument| argument == "--help" || argument == "-h") {
        let _ = writeln!(std::io::stdout(), "{USAGE}");
        return ExitCode::SUCCESS;
    }
    let Some(request) = Request::parse(arguments) else {
        let _ = writeln!(std::io::stderr(), "{USAGE}");
        return ExitCode::from(2);
    };
    let verdict = request.run();
    let _ = write!(std::io::stdout(), "{}", verdict.text);
    if verdict.good { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}

impl Request {
    /// Reads what stands behind `check`; none: it is no request.
    pub fn parse(arguments: &[String]) -> Option<Self> {
        let mut out = Self::default();
        for argument in arguments {
            match argument.as_str() {
                "--reject-unknown-dynamic-fields" => out.reject_unknown = true,
                "--allow-unknown-static-fields" => out.allow_unknown_static = true,
                flag if flag.starts_with('-') && flag != read::STDIN => return None,
                file => out.files.push(file.into()),
            }
        }
        (!out.files.is_empty()).then_some(out)
    }

    /// Checks all files.
    pub fn run(&self) -> Verdict {
        let files = self.files.iter().flat_map(|file| files(file));
        let contents: Vec<_> = files.map(|file| (read(&file), file)).collect();
        let resources = contents.iter().filter_map(|(content, _)| match content {
            Ok(Content::Resources(resources) | Content::Response(resources)) => Some(resources),
            _ => None,
        });
        let mut clusters = HashSet::new();
        for any in resources.flatten() {
            if name_of(any) == Cluster::full_name()
                && let Ok(cluster) = Cluster::decode(any.value.as_slice())
            {
                clusters.insert(cluster.name);
            }
        }
        let mut verdict = Verdict { good: true, ..Verdict::default() };
        for (content, file) in contents {
            let wrong = match content {
                Ok(Content::Bootstrap(text)) => self.bootstrap(&file, text).err().into_iter().collect(),
                Ok(Content::Resources(all)) => self.resources(&all, &clusters),
                Ok(Content::Response(all)) => {
                    let mut wrong = self.resources(&all, &clusters);
                    wrong.extend(twice(&all));
                    wrong
                }
                Err(reason) => vec![reason],
            };
            verdict.good &= wrong.is_empty();
            let file = file.display();
            if wrong.is_empty() {
                // Writing to a text cannot fail.
                let _ = writeln!(verdict.text, "{file}: OK");
            }
            for reason in wrong {
                let _ = writeln!(verdict.text, "{file}: {reason}");
            }
        }
        verdict
    }

    fn bootstrap(&self, file: &Path, text: Option<String>) -> Result<(), String> {
        let options = Options {
            config_path: text.is_none().then(|| file.to_path_buf()),
            config_yaml: text,
            mode: Mode::Validate,
            allow_unknown_static: self.allow_unknown_static,
            ..Options::default()
        };
        server::validate(&options).map_err(|e| e.to_string())
    }

    fn resources(&self, all: &[Any], clusters: &HashSet<String>) -> Vec<String> {
        let Ok(runtime) = LocalRuntime::new() else { return vec!["no runtime".to_owned()] };
        runtime.block_on(async {
            let reject = self.reject_unknown;
            let unknown = if reject { UnknownFields::Reject } else { UnknownFields::Ignore };
            let checker = Checker::new(unknown, clusters.clone());
            all.iter().filter_map(|any| checker.any(any).err()).collect()
        })
    }
}

/// A folder's files, by name.
fn files(path: &Path) -> Vec<PathBuf> {
    const KNOWN: [&str; 5] = ["json", "pb", "pb_text", "yaml", "yml"];
    let Ok(folder) = std::fs::read_dir(path) else { return vec![path.to_path_buf()] };
    let all = folder.filter_map(|entry| Some(entry.ok()?.path()));
    let known = |path: &PathBuf| path.extension().is_some_and(|of| KNOWN.iter().any(|known| of == *known));
    let mut all: Vec<_> = all.filter(|path| known(path) && path.is_file()).collect();
    if all.is_empty() {
        // To be told that it cannot be read.
        all.push(path.to_path_buf());
    }
    all.sort();
    all
}

/// What stands more than once in a response.
fn twice(all: &[Any]) -> Vec<String> {
    let mut seen = HashSet::new();
    let again = |any: &Any| {
        let (what, name) = match name_of(any) {
            of if of == Cluster::full_name() => ("cluster", Cluster::decode(any.value.as_slice()).ok()?.name),
            of if of == Listener::full_name() => {
                ("listener", Listener::decode(any.value.as_slice()).ok()?.name)
            }
            of if of == ScopedRouteConfiguration::full_name() => {
                let scope = ScopedRouteConfiguration::decode(any.value.as_slice()).ok()?;
                ("scoped route configuration", scope.name)
            }
            _ => return None,
        };
        let told = format!("{what} '{name}': duplicate {what} {name} found");
        (!seen.insert((what, name))).then_some(told)
    };
    all.iter().filter_map(again).collect()
}

fn name_of(any: &Any) -> &str {
    any.type_url.rsplit('/').next().unwrap_or_default()
}

/// What resources are checked with.
struct Checker {
    unknown: UnknownFields,
    server: Arc<Server>,
    clusters: ClusterManager,
    http: HttpFilterRegistry,
    network: NetworkFilterRegistry,
}

impl Checker {
    fn new(unknown: UnknownFields, known: HashSet<String>) -> Self {
        let stats = Store::new();
        let clusters = ClusterManager::new(&stats.root(), StaticSecrets::default());
        let has = Arc::new(move |name: &str| known.is_empty() || known.contains(name));
        let node = NodeInfo { id: "check".into(), cluster: "check".into(), ..NodeInfo::default() };
        let mut server = Server::new(stats, Runtime::default(), StaticSecrets::default(), node, has);
        server.dns_caches = clusters.dns_caches().clone();
        let mut http = HttpFilterRegistry::default();
        sampan_http::filters::register(&mut http);
        Self { unknown, server: Arc::new(server), clusters, http, network: boot::network_filters() }
    }

    /// The error names the resource and the reason.
    fn any(&self, any: &Any) -> Result<(), String> {
        let name = name_of(any);
        if name == Wrapper::full_name() {
            let wrapper = Wrapper::decode(any.value.as_slice()).map_err(|e| e.to_string())?;
            return wrapper.resource.as_ref().map_or(Ok(()), |inner| self.any(inner));
        }
        macro_rules! by_type {
            ($($message:ty: $what:literal $check:ident),* $(,)?) => {
                $(if name == <$message>::full_name() {
                    let unpacked = unpack::<$message>(&any.value, self.unknown);
                    let checked = unpacked.and_then(|(message, _)| self.$check(&message));
                    return checked.map_err(|reason| {
                        // What breaks a constraint can still say who it is.
                        match <$message>::decode(any.value.as_slice()) {
                            Ok(message) if !message.resource_name().is_empty() => {
                                format!("{} '{}': {reason}", $what, message.resource_name())
                            }
                            _ => reason,
                        }
                    });
                })*
            };
        }
        by_type! {
            Cluster: "cluster" cluster,
            ClusterLoadAssignment: "endpoints" endpoints,
            Listener: "listener" listener,
            RouteConfiguration: "route table" routes,
            ScopedRouteConfiguration: "scope" scope,
            VirtualHost: "virtual host" virtual_host,
            Secret: "secret" secret,
            TypedExtensionConfig: "extension" extension,
            RuntimeLayer: "runtime layer" layer,
        }
        Err(format!("{name}: no such resource is known"))
    }

    fn cluster(&self, message: &Cluster) -> Result<(), String> {
        let config = ClusterConfig::from_proto(message, true).map_err(|e| e.to_string())?;
        self.clusters.add(config).map(drop).map_err(|e| e.to_string())
    }

    fn endpoints(&self, message: &ClusterLoadAssignment) -> Result<(), String> {
        LoadAssignment::from_proto(message, false).map(drop).map_err(|e| e.to_string())
    }

    fn listener(&self, message: &Listener) -> Result<(), String> {
        ListenerConfig::from_proto(message, &self.server, &self.network).map(drop).map_err(|e| e.to_string())
    }

    fn routes(&self, message: &RouteConfiguration) -> Result<(), String> {
        let (registry, clusters) = (&self.http, &*self.server.clusters);
        let context = RouteContext { registry, clusters, validate_clusters: false };
        RouteTable::from_proto(message, &context).map(drop).map_err(|e| e.to_string())
    }

    fn scope(&self, message: &ScopedRouteConfiguration) -> Result<(), String> {
        message.route_configuration.as_ref().map_or(Ok(()), |routes| self.routes(routes))
    }

    fn virtual_host(&self, message: &VirtualHost) -> Result<(), String> {
        self.routes(&RouteConfiguration { virtual_hosts: vec![message.clone()], ..Default::default() })
    }

    /// As a listener or a cluster uses it.
    fn secret(&self, message: &Secret) -> Result<(), String> {
        let mut secrets = StaticSecrets::default();
        secrets.add(message.clone()).map_err(|e| e.to_string())?;
        let wanted = SdsSecretConfig { name: message.name.clone(), sds_config: None };
        let scope = self.server.stats.root();
        let mut common = CommonTlsContext::default();
        let made = match &message.r#type {
            Some(SecretType::TlsCertificate(_)) => {
                common.tls_certificate_sds_secret_configs = vec![wanted];
                let context = DownstreamTlsContext { common_tls_context: Some(common), ..Default::default() };
                ServerContext::from_proto(&context, &secrets, &scope).map(drop)
            }
            Some(SecretType::ValidationContext(_)) => {
                common.validation_context_type =
                    Some(common_tls_context::ValidationContextType::ValidationContextSdsSecretConfig(wanted));
                let context = UpstreamTlsContext { common_tls_context: Some(common), ..Default::default() };
                ClientContext::from_proto(&context, &secrets, &scope).map(drop)
            }
            Some(SecretType::SessionTicketKeys(keys)) => sampan_tls::check_ticket_keys(keys),
            _ => Ok(()),
        };
        made.map_err(|e| e.reason().to_owned())
    }

    fn extension(&self, message: &TypedExtensionConfig) -> Result<(), String> {
        let given = message.typed_config.clone().unwrap_or_default();
        let (type_url, value) =
            sampan_config::any::resolve(&given.type_url, &given.value).map_err(|e| e.to_string())?;
        let config = Any { type_url: type_url.into_owned(), value: value.into_owned() };
        let factory = self.context();
        let type_name = name_of(&config);
        let made = if let Some(known) = self.network.factory(type_name) {
            known(&config, &factory).map(drop)
        } else {
            let filter_name = &message.name;
            let context = HttpFilterContext { factory: &factory, stat_prefix: "http.check", filter_name };
            self.http.make(&config, &context).map(drop)
        };
        made.map_err(|e| e.to_string())
    }

    fn layer(&self, message: &RuntimeLayer) -> Result<(), String> {
        self.server.runtime.set_layer(0, message.layer.as_ref()).map_err(|e| e.to_string())
    }

    fn context(&self) -> FactoryContext {
        FactoryContext {
            server: self.server.clone(),
            listener_name: "check".into(),
            listener_scope: self.server.stats.root().scope("listener.check"),
            listener_metadata: None,
            traffic_direction: TrafficDirection::Unspecified,
            drain_modify_only: false,
            filter_chain: "".into(),
            tls: false,
            buffer_limit: 1024 * 1024,
            overload: None,
            wants: Default::default(),
        }
    }
}

#[cfg(test)]
mod tests;
