//! What an authorization server has said, whether over gRPC or over HTTP.

use envoy_types::pb::envoy::config::core::v3::HeaderValueOption;
use envoy_types::pb::envoy::config::core::v3::header_value_option::HeaderAppendAction as Action;
use envoy_types::pb::envoy::service::auth::v3::check_response::HttpResponse;
use envoy_types::pb::envoy::service::auth::v3::{CheckResponse, DeniedHttpResponse, OkHttpResponse};
use envoy_types::pb::google::protobuf::Struct;

/// Names as they came, and values.
pub(super) type Headers = Vec<(Vec<u8>, Vec<u8>)>;

/// What it comes to.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(super) enum Verdict {
    Ok,
    Denied,
    /// It could not be asked, or could not tell.
    #[default]
    Error,
}

/// The answer.
#[derive(Debug, Default)]
pub(super) struct Response {
    pub(super) verdict: Verdict,
    /// Of the reply; 0 where it was not told.
    pub(super) status: u16,
    pub(super) body: Vec<u8>,
    /// Of the request, and of the reply where there is one.
    pub(super) set: Headers,
    pub(super) add: Headers,
    /// Only where there is such a header.
    pub(super) append: Headers,
    pub(super) remove: Vec<Vec<u8>>,
    pub(super) on_response: ResponseHeaders,
    pub(super) query_set: Vec<(String, String)>,
    pub(super) query_remove: Vec<String>,
    pub(super) metadata: Struct,
    /// An action that the enum does not have.
    pub(super) bad_action: bool,
}

/// What the upstream's response gets.
#[derive(Debug, Default)]
pub(super) struct ResponseHeaders {
    pub(super) add: Headers,
    pub(super) set: Headers,
    pub(super) add_if_absent: Headers,
    pub(super) overwrite: Headers,
}

impl ResponseHeaders {
    /// In the order in which they apply.
    pub(super) fn all(&self) -> [(Action, &Headers); 4] {
        [
            (Action::AppendIfExistsOrAdd, &self.add),
            (Action::OverwriteIfExistsOrAdd, &self.set),
            (Action::AddIfAbsent, &self.add_if_absent),
            (Action::OverwriteIfExists, &self.overwrite),
        ]
    }

    pub(super) fn is_empty(&self) -> bool {
        self.all().iter().all(|(_, headers)| headers.is_empty())
    }
}

fn pair(option: &HeaderValueOption) -> (Vec<u8>, Vec<u8>) {
    option.header.as_ref().map(|h| (h.key.clone().into(), h.value.clone().into())).unwrap_or_default()
}

impl From<CheckResponse> for Response {
    fn from(message: CheckResponse) -> Self {
        let ok = message.status.as_ref().is_none_or(|status| status.code == 0);
        let mut this = Self {
            verdict: if ok { Verdict::Ok } else { Verdict::Denied },
            metadata: message.dynamic_metadata.unwrap_or_default(),
            ..Self::default()
        };
        match message.http_response {
            Some(HttpResponse::ErrorResponse(error)) if !ok => {
                this.verdict = Verdict::Error;
                this.reply(error);
            }
            Some(HttpResponse::DeniedResponse(denied)) if !ok => this.reply(denied),
            Some(HttpResponse::OkResponse(mut response)) => {
                #[allow(deprecated, reason = "Envoy 1.40 still takes it, and before the other")]
                if let Some(metadata) = response.dynamic_metadata.take() {
                    this.metadata = metadata;
                }
                if ok {
                    this.mutations(response);
                }
            }
            _ => {}
        }
        this
    }
}

impl Response {
    fn reply(&mut self, message: DeniedHttpResponse) {
        let status = message.status.map_or(0, |status| status.code);
        self.status = u16::try_from(status).unwrap_or(0);
        self.body = message.body.into();
        self.headers(&message.headers);
    }

    #[allow(deprecated, reason = "`append` is what counts here")]
    fn headers(&mut self, headers: &[HeaderValueOption]) {
        for option in headers {
            let append = option.append.is_some_and(|append| append.value);
            let list = if append { &mut self.append } else { &mut self.set };
            list.push(pair(option));
        }
    }

    #[allow(deprecated, reason = "`append` counts where it is set")]
    fn mutations(&mut self, message: OkHttpResponse) {
        self.headers(&message.headers);
        for option in &message.response_headers_to_add {
            let action = match option.append.map(|append| append.value) {
                Some(true) => Ok(Action::AppendIfExistsOrAdd),
                Some(false) => Ok(Action::OverwriteIfExistsOrAdd),
                None => Action::try_from(option.append_action),
            };
            let list = match action {
                Ok(Action::AppendIfExistsOrAdd) => &mut self.on_response.add,
                Ok(Action::OverwriteIfExistsOrAdd) => &mut self.on_response.set,
                Ok(Action::AddIfAbsent) => &mut self.on_response.add_if_absent,
                Ok(Action::OverwriteIfExists) => &mut self.on_response.overwrite,
                Err(_) => {
                    self.bad_action = true;
                    continue;
                }
            };
            list.push(pair(option));
        }
        self.remove = message.headers_to_remove.into_iter().map(Into::into).collect();
        self.query_set = message.query_parameters_to_set.into_iter().map(|p| (p.key, p.value)).collect();
        self.query_remove = message.query_parameters_to_remove;
    }
}
