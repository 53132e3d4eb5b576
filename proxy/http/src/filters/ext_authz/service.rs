//! The authorization server: asked over gRPC (`Authorization.Check`), or with a copy of the request's head over HTTP,
//! whose status is the answer then.

use std::time::Duration;

use bytes::Bytes;
use envoy_types::pb::envoy::config::core::v3 as core;
use envoy_types::pb::envoy::extensions::filters::http::ext_authz::v3 as pb;
use envoy_types::pb::envoy::service::auth::v3::attribute_context::HttpRequest;
use envoy_types::pb::envoy::service::auth::v3::{CheckRequest, CheckResponse};
use envoy_types::pb::envoy::r#type::matcher::v3::ListStringMatcher;
use envoy_types::pb::google::protobuf::{Value, value::Kind};
use sampan_core::error::{AtField, ConfigError, ConfigResult};
use sampan_core::header::{HeaderId, HeaderMap, HeaderName};
use sampan_core::matcher::StringMatcher;
use sampan_upstream::WorkerClusters;

use super::check::{any, sanitized};
use super::response::{Response, Verdict};
use crate::filters::refuse;
use crate::manager::duration;
use crate::route::HeaderMutations;
use crate::router::callout::{self, Answer, Asker, Request};
use crate::router::grpc::GrpcService;

const METHOD: &str = "/envoy.service.auth.v3.Authorization/Check";
/// Where a message has none.
const TIMEOUT: Duration = Duration::from_millis(200);
/// In the answer of a server over HTTP: which of the request's headers go.
const TO_REMOVE: &str = "x-envoy-auth-headers-to-remove";

/// Whom to ask.
pub(super) enum Service {
    Grpc(GrpcService),
    Http(Box<HttpService>),
}

/// A server that is asked over HTTP.
pub(super) struct HttpService {
    cluster: String,
    timeout: Duration,
    path: PathRewrite,
    headers_to_add: HeaderMutations,
    /// What of its answer goes where; `client` without any is all.
    upstream: Vec<StringMatcher>,
    upstream_append: Vec<StringMatcher>,
    client: Vec<StringMatcher>,
    client_on_success: Vec<StringMatcher>,
    metadata: Vec<StringMatcher>,
}

enum PathRewrite {
    Prefix(String),
    Whole(String),
}

/// A list of matchers.
pub(super) fn matchers(list: Option<&ListStringMatcher>, field: &str) -> ConfigResult<Vec<StringMatcher>> {
    let Some(list) = list else { return Ok(Vec::new()) };
    StringMatcher::list_from_proto(&list.patterns, "patterns").at(field)
}

impl Service {
    pub(super) fn grpc(message: &core::GrpcService) -> ConfigResult<Self> {
        Ok(Self::Grpc(GrpcService::from_proto(message, Some(TIMEOUT))?))
    }

    pub(super) fn http(message: &pb::HttpService) -> ConfigResult<Self> {
        Ok(Self::Http(Box::new(HttpService::from_proto(message)?)))
    }

    /// Asks.
    pub(super) async fn check(
        &self,
        clusters: &WorkerClusters,
        request: CheckRequest,
        asker: Asker<'_>,
    ) -> Response {
        let error = |_| Response::default();
        match self {
            Self::Grpc(service) => {
                let answer = service.call::<CheckResponse>(clusters, METHOD, &request, asker).await;
                answer.map(Into::into).unwrap_or_else(error)
            }
            Self::Http(service) => {
                let http = request.attributes.and_then(|all| all.request).and_then(|request| request.http);
                let Some(request) = service.request(http.unwrap_or_default(), asker) else {
                    return Response::default();
                };
                callout::ask(clusters, request)
                    .await
                    .map_or_else(|_| Response::default(), |a| service.read(a))
            }
        }
    }
}

impl HttpService {
    fn from_proto(message: &pb::HttpService) -> ConfigResult<Self> {
        use core::http_uri::HttpUpstreamType;
        refuse(message.retry_policy.is_some(), "retry_policy")?;
        let Some(uri) = &message.server_uri else { return Err(ConfigError::missing("server_uri")) };
        let Some(HttpUpstreamType::Cluster(cluster)) = &uri.http_upstream_type else {
            return Err(ConfigError::missing("http_upstream_type").at("server_uri"));
        };
        for (path, field) in
            [(&message.path_prefix, "path_prefix"), (&message.path_override, "path_override")]
        {
            if !path.is_empty() && !path.starts_with('/') {
                return Err(ConfigError::new(format!("{field} should start with \"/\".")).at(field));
            }
        }
        if !message.path_prefix.is_empty() && !message.path_override.is_empty() {
            return Err(ConfigError::new("Only one of path_prefix or path_override may be set."));
        }
        let request = message.authorization_request.as_ref();
        let to_add = request.map(|request| &*request.headers_to_add).unwrap_or_default();
        let response = message.authorization_response.clone().unwrap_or_default();
        let of_answer = |list: Option<&_>, field| matchers(list, field).at("authorization_response");
        let mut client = of_answer(response.allowed_client_headers.as_ref(), "allowed_client_headers")?;
        if !client.is_empty() {
            let always = ["content-length", "www-authenticate", "location"];
            client.extend(always.map(StringMatcher::exact));
        }
        Ok(Self {
            cluster: cluster.clone(),
            timeout: uri.timeout.as_ref().map_or(TIMEOUT, duration),
            path: match message.path_override.as_str() {
                "" => PathRewrite::Prefix(message.path_prefix.clone()),
                whole => PathRewrite::Whole(whole.to_owned()),
            },
            headers_to_add: HeaderMutations::overwriting(to_add, "headers_to_add")
                .at("authorization_request")?,
            upstream: of_answer(response.allowed_upstream_headers.as_ref(), "allowed_upstream_headers")?,
            upstream_append: of_answer(
                response.allowed_upstream_headers_to_append.as_ref(),
                "allowed_upstream_headers_to_append",
            )?,
            client,
            client_on_success: of_answer(
                response.allowed_client_headers_on_success.as_ref(),
                "allowed_client_headers_on_success",
            )?,
            metadata: of_answer(
                response.dynamic_metadata_from_headers.as_ref(),
                "dynamic_metadata_from_headers",
            )?,
        })
    }

    /// What is sent; none where the server may not see what every request needs.
    fn request(&self, told: HttpRequest, asker: Asker<'_>) -> Option<Request<'_>> {
        let body = if told.body.is_empty() { Bytes::from(told.raw_body) } else { told.body.into() };
        let mut lines: Vec<(Vec<u8>, Vec<u8>)> = match told.header_map {
            Some(list) => list.headers.into_iter().map(|h| (h.key.into(), h.raw_value)).collect(),
            None => told.headers.into_iter().map(|(name, value)| (name.into(), value.into())).collect(),
        };
        // Pseudo headers stand first; the order of the others is nobody's.
        lines.sort_by_key(|(name, _)| (!name.starts_with(b":"), name.clone()));
        let pseudo = lines.iter().take_while(|(name, _)| name.starts_with(b":")).count();
        let mut headers = HeaderMap::with_capacity(512, 16);
        for (at, (name, value)) in lines.iter().enumerate() {
            if at == pseudo {
                headers.append(HeaderId::CONTENT_LENGTH, body.len().to_string());
            }
            match (&name[..], &self.path) {
                (b"content-length", _) => {}
                (b":path", PathRewrite::Whole(path)) => headers.append(HeaderId::PATH, path),
                (b":path", PathRewrite::Prefix(prefix)) => {
                    headers.append(HeaderId::PATH, [prefix.as_bytes(), value].concat());
                }
                (name, _) => drop(headers.append_lower(name, value)),
            }
        }
        if pseudo == lines.len() {
            headers.append(HeaderId::CONTENT_LENGTH, body.len().to_string());
        }
        asker.add(&self.headers_to_add, &mut headers);
        let needed = [HeaderId::METHOD, HeaderId::PATH, HeaderId::AUTHORITY];
        if !needed.iter().all(|id| headers.contains(*id)) {
            return None;
        }
        let request = Request::new(&self.cluster, headers, body);
        Some(Request { timeout: Some(self.timeout).filter(|t| !t.is_zero()), forwarded: false, ..request })
    }

    /// What its answer means: 200 is yes, 5xx is trouble, all else is no.
    fn read(&self, answer: Answer) -> Response {
        if answer.status >= 500 {
            return Response::default();
        }
        let mut response = Response { status: answer.status, ..Response::default() };
        let mut headers = answer.headers;
        let to_remove = HeaderName::new(TO_REMOVE);
        match answer.status {
            200 => {
                response.verdict = Verdict::Ok;
                let names = headers.get_all_name(&to_remove).flat_map(|value| value.split(|c| *c == b','));
                let names = names.map(<[u8]>::trim_ascii).filter(|name| !name.is_empty());
                response.remove = names.map(Into::into).collect();
            }
            _ => {
                response.verdict = Verdict::Denied;
                response.body = answer.body.into();
            }
        }
        headers.remove_name(&to_remove);
        let denied = response.verdict == Verdict::Denied;
        for (id, name, value) in headers.iter() {
            if any(&self.metadata, name) {
                let text = Value { kind: Some(Kind::StringValue(sanitized(value))) };
                response.metadata.fields.insert(sanitized(name), text);
            }
            if id.is_pseudo() {
                continue;
            }
            let pair = || (name.to_vec(), value.to_vec());
            let set = if denied {
                self.client.is_empty() || any(&self.client, name)
            } else {
                any(&self.upstream, name)
            };
            if set {
                response.set.push(pair());
            }
            if any(&self.upstream_append, name) {
                response.add.push(pair());
            }
            if any(&self.client_on_success, name) {
                response.on_response.add.push(pair());
            }
        }
        response
    }
}
