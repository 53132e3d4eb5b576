//! What an answer does: to the request that goes on, or as the reply.

use std::sync::Arc;
use std::time::Instant;

use envoy_types::pb::google::protobuf::{Value, value::Kind};
use sampan_core::header::{HeaderId, HeaderMap, HeaderName};
use sampan_core::stream_info::ResponseFlag;
use sampan_upstream::Cluster;

use super::response::{Response, Verdict};
use super::{ExtAuthz, refusal};
use crate::filter::{LocalReply, Outcome, State};
use crate::filters::header_mutation::query;
use crate::filters::mutation_rules::{Operation, Ruling, is_removable, name_is_valid, value_is_valid};
use crate::route::{append_header, as_stored};
use crate::router::count;
use crate::stream::Stream;

/// The namespace of the dynamic metadata, whatever the filter is called.
const NAMESPACE: &str = "envoy.filters.http.ext_authz";
const FAILURE_ALLOWED: &str = "x-envoy-auth-failure-mode-allowed";

/// The answer is unusable as a whole.
struct Invalid;

/// Where the request went when the server was asked.
type To<'c> = Option<&'c Arc<Cluster>>;

/// Whether a header can be sent at all.
fn can_be_sent(name: &[u8], value: &[u8]) -> bool {
    !name.is_empty() && name_is_valid(name) && value_is_valid(value)
}

/// Another value of a header.
pub(super) fn add(headers: &mut HeaderMap, name: &[u8], value: &[u8]) {
    if can_be_sent(name, value) {
        append_header(headers, as_stored(&HeaderName::new(name)), value);
    }
}

/// The only value of a header.
pub(super) fn set(headers: &mut HeaderMap, name: &[u8], value: &[u8]) {
    if can_be_sent(name, value) {
        let name = HeaderName::new(name);
        let name = as_stored(&name);
        if name.id().is_pseudo() {
            headers.set_name(name, value);
        } else {
            headers.remove_name(name);
            headers.append_name(name, value);
        }
    }
}

impl ExtAuthz {
    pub(super) fn apply(
        &self,
        stream: &mut Stream,
        state: &mut State,
        mut answer: Response,
        start: Instant,
    ) -> Outcome {
        let cluster = Self::cluster(stream);
        let cluster = cluster.as_ref();
        if answer.bad_action && self.config.validate {
            return self.invalid(cluster);
        }
        self.take_metadata(stream, &mut answer, start);
        match answer.verdict {
            Verdict::Ok => match self.mutate(stream, &mut answer) {
                Ok(()) => {
                    if !answer.on_response.is_empty() {
                        *state = Some(Box::new(answer.on_response));
                    }
                    self.stats.ok.inc();
                    self.count(cluster, &self.stats.names.ok);
                    Outcome::Continue
                }
                Err(Invalid) => self.invalid(cluster),
            },
            Verdict::Denied => self.deny(cluster, answer),
            Verdict::Error => self.fail(stream, cluster, answer),
        }
    }

    fn count(&self, cluster: To<'_>, what: &str) {
        if let Some(cluster) = cluster {
            count::other(cluster, what);
        }
    }

    fn take_metadata(&self, stream: &mut Stream, answer: &mut Response, start: Instant) {
        let metadata = &mut answer.metadata.fields;
        if metadata.is_empty() {
            return;
        }
        if !self.config.takes_metadata {
            self.stats.ignored_dynamic_metadata.inc();
            return;
        }
        if answer.verdict == Verdict::Ok {
            let took = Kind::NumberValue(Self::milliseconds_since(start));
            metadata.insert("ext_authz_duration".to_owned(), Value { kind: Some(took) });
        }
        stream.info.dynamic_metadata_mut(NAMESPACE).fields.extend(metadata.drain());
    }

    fn mutate(&self, stream: &mut Stream, answer: &mut Response) -> Result<(), Invalid> {
        let moves = self.config.clear_route_cache
            && (!answer.set.is_empty()
                || !answer.append.is_empty()
                || !answer.remove.is_empty()
                || !answer.query_set.is_empty()
                || !answer.query_remove.is_empty());
        self.mutate_headers(&mut stream.request, answer)?;
        if self.config.validate {
            let mut all = answer.on_response.all().into_iter().flat_map(|(_, headers)| headers);
            if !all.all(|(name, value)| name_is_valid(name) && value_is_valid(value)) {
                return Err(Invalid);
            }
            let bad = |text: &str| query::encoded(text.as_bytes()) != text.as_bytes();
            if answer.query_set.iter().any(|(name, value)| bad(name) || bad(value)) {
                return Err(Invalid);
            }
        }
        if !answer.query_set.is_empty() || !answer.query_remove.is_empty() {
            query::rewrite(&mut stream.request, |parameters| {
                for (name, value) in &answer.query_set {
                    parameters.insert(name.clone().into(), vec![value.clone().into()]);
                }
                for name in &answer.query_remove {
                    parameters.remove(name.as_bytes());
                }
            });
        }
        let limits = &stream.manager.h1;
        if stream.request.len() > limits.max_headers || stream.request.byte_size() > limits.max_header_bytes {
            return Err(Invalid);
        }
        if moves {
            stream.refresh_route();
        }
        Ok(())
    }

    fn mutate_headers(&self, request: &mut HeaderMap, answer: &Response) -> Result<(), Invalid> {
        for (name, value) in &answer.set {
            if self.allows(Operation::Set, name, value)? {
                set(request, name, value);
            }
        }
        for (name, value) in &answer.add {
            if self.allows(Operation::Set, name, value)? {
                add(request, name, value);
            }
        }
        for (name, value) in &answer.append {
            let there = HeaderName::new(name);
            if self.allows(Operation::Append, name, value)? && can_be_sent(name, value) {
                let separator = if there.id() == HeaderId::COOKIE { "; " } else { "," };
                request.append_to_existing(as_stored(&there), separator, value);
            }
        }
        for name in &answer.remove {
            if self.config.validate && !name_is_valid(name) {
                continue;
            }
            let removable = match &self.config.rules {
                None => is_removable(name),
                Some(rules) => match rules.check(Operation::Remove, &HeaderName::new(name), b"") {
                    Ruling::Done => true,
                    Ruling::Ignored => false,
                    Ruling::Failed => return Err(Invalid),
                },
            };
            if removable {
                request.remove_name(&HeaderName::new(name));
            }
        }
        Ok(())
    }

    /// Whether a header of the request may be changed so.
    fn allows(&self, operation: Operation, name: &[u8], value: &[u8]) -> Result<bool, Invalid> {
        if self.config.validate && !(name_is_valid(name) && value_is_valid(value)) {
            return Err(Invalid);
        }
        let Some(rules) = &self.config.rules else { return Ok(true) };
        match rules.check(operation, &HeaderName::new(name), value) {
            Ruling::Done => Ok(true),
            Ruling::Ignored => Ok(false),
            Ruling::Failed => Err(Invalid),
        }
    }

    fn deny(&self, cluster: To<'_>, answer: Response) -> Outcome {
        let status = if answer.status == 0 { 403 } else { answer.status };
        self.stats.denied.inc();
        self.count(cluster, &self.stats.names.denied);
        if let Some(cluster) = cluster.filter(|_| self.config.charges_cluster) {
            count::internal(cluster, status);
        }
        self.reply(cluster, status, "ext_authz_denied", answer)
    }

    fn fail(&self, stream: &mut Stream, cluster: To<'_>, answer: Response) -> Outcome {
        self.stats.error.inc();
        self.count(cluster, &self.stats.names.error);
        if self.config.failure_allowed {
            self.stats.failure_mode_allowed.inc();
            self.count(cluster, &self.stats.names.failure_mode_allowed);
            if self.config.failure_header {
                add(&mut stream.request, FAILURE_ALLOWED.as_bytes(), b"true");
            }
            return Outcome::Continue;
        }
        let status = if answer.status == 0 { self.config.status_on_error } else { answer.status };
        self.reply(cluster, status, "ext_authz_error", answer)
    }

    /// The server's reply to the client.
    fn reply(&self, cluster: To<'_>, status: u16, details: &'static str, answer: Response) -> Outcome {
        let valid = answer.set.iter().all(|(name, value)| name_is_valid(name) && value_is_valid(value));
        if self.config.validate && !valid {
            return self.invalid(cluster);
        }
        let mut body = answer.body;
        if self.config.max_denied_body > 0 {
            body.truncate(self.config.max_denied_body);
        }
        let body =
            String::from_utf8(body).unwrap_or_else(|e| String::from_utf8_lossy(e.as_bytes()).into_owned());
        let mut reply = refusal(status, details).body(body);
        // A length is put right where there is a body.
        let length = !reply.body.is_empty();
        let sent = answer.set.into_iter().filter(|(name, value)| {
            can_be_sent(name, value)
                && is_removable(name)
                && (length || !name.eq_ignore_ascii_case(b"content-length"))
        });
        reply.headers.extend(sent.map(|(name, value)| (HeaderName::new(name), value)));
        reply.outcome()
    }

    fn invalid(&self, cluster: To<'_>) -> Outcome {
        self.stats.invalid.inc();
        self.count(cluster, &self.stats.names.invalid);
        LocalReply::new(500, "ext_authz_invalid").flag(ResponseFlag::UnauthorizedExternalService).outcome()
    }
}
