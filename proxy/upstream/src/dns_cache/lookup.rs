//! One question for a name, and the answer in c-ares' words, which are the details of what fails.

use std::net::IpAddr;
use std::sync::{Arc, LazyLock};
use std::time::Duration;

use hickory_resolver::Hosts;
use hickory_resolver::net::{DnsError, NetError};
use hickory_resolver::proto::op::{Query, ResponseCode};
use hickory_resolver::proto::rr::{Name, RecordType};
use sampan_core::matcher::CidrSet;

use super::name::{LOOPBACKS, Special, special};
use crate::config::LookupFamily;
use crate::dns::SharedResolver;

/// What became of it.
pub(super) struct Answer {
    /// Nobody could tell; that there is nothing is an answer.
    pub(super) failed: bool,
    pub(super) addresses: Vec<IpAddr>,
    pub(super) ttl: Duration,
    pub(super) details: &'static str,
    /// There were addresses, but none that is allowed.
    pub(super) denied: bool,
}

impl Answer {
    pub(super) fn failure(details: &'static str) -> Self {
        Self { failed: true, ..Self::empty(details) }
    }

    fn empty(details: &'static str) -> Self {
        Self { failed: false, addresses: Vec::new(), ttl: Duration::ZERO, details, denied: false }
    }

    fn of(addresses: Vec<IpAddr>, ttl: Duration) -> Self {
        Self { addresses, ttl, ..Self::empty("cares_success:Successful_completion") }
    }

    /// Without the addresses that are not allowed.
    pub(super) fn without(mut self, denied: Option<&CidrSet>) -> Self {
        let Some(denied) = denied.filter(|_| !self.addresses.is_empty()) else { return self };
        self.addresses.retain(|ip| !denied.contains(ip.to_canonical()));
        if self.addresses.is_empty() {
            (self.denied, self.details) = (true, "address_denied");
        }
        self
    }

    /// As the details of a response say it.
    pub(super) fn told(&self) -> Arc<str> {
        if self.failed || self.addresses.is_empty() {
            format!("dns_resolution_failure{{{}}}", self.details).into()
        } else {
            self.details.into()
        }
    }
}

const MISFORMATTED: &str = "cares_failure:Misformatted_domain_name";
const NOT_FOUND: &str = "cares_norecords:Domain_name_not_found";

/// The answer for what is no name.
pub(super) fn misformatted() -> Answer {
    Answer::failure(MISFORMATTED)
}

/// Asks.
pub(super) async fn look_up(resolver: &SharedResolver, family: LookupFamily, name: &str) -> Answer {
    match special(name) {
        Some(Special::Ip(ip)) => match (ip, family) {
            (IpAddr::V4(_), LookupFamily::V6Only) => Answer::empty(NOT_FOUND),
            (IpAddr::V6(_), LookupFamily::V4Only) => Answer::failure(MISFORMATTED),
            _ => Answer::of(vec![ip], Duration::ZERO),
        },
        Some(Special::Localhost) => Answer::of(loopbacks(family), Duration::ZERO),
        Some(Special::None) => Answer::empty(NOT_FOUND),
        Some(Special::Misformatted) => misformatted(),
        None => match resolver.look_up(family, name).await {
            // The library takes what /etc/hosts says for good for a day.
            Ok((addresses, _)) if in_hosts_file(name) => Answer::of(addresses, Duration::ZERO),
            Ok((addresses, ttl)) => Answer::of(addresses, ttl),
            Err(error) => error_of(&error),
        },
    }
}

fn in_hosts_file(name: &str) -> bool {
    static HOSTS: LazyLock<Hosts> = LazyLock::new(|| Hosts::from_system().unwrap_or_default());
    let Ok(name) = Name::from_utf8(name) else { return false };
    [RecordType::A, RecordType::AAAA]
        .iter()
        .any(|kind| HOSTS.lookup_static_host(&Query::query(name.clone(), *kind)).is_some())
}

fn loopbacks(family: LookupFamily) -> Vec<IpAddr> {
    let [v4, v6] = LOOPBACKS;
    match family {
        LookupFamily::V4Only | LookupFamily::V4Preferred => vec![v4],
        LookupFamily::V6Only | LookupFamily::Auto => vec![v6],
        LookupFamily::All => vec![v4, v6],
    }
}

fn error_of(error: &NetError) -> Answer {
    let code = match error {
        NetError::Timeout => return Answer::failure("cares_failure:Timeout_while_contacting_DNS_servers"),
        NetError::Dns(DnsError::NoRecordsFound(none)) => none.response_code,
        NetError::Dns(DnsError::ResponseCode(code)) => *code,
        _ => return Answer::failure("cares_failure:Could_not_contact_DNS_servers"),
    };
    match code {
        ResponseCode::NXDomain => Answer::empty(NOT_FOUND),
        ResponseCode::NoError => Answer::empty("cares_norecords:DNS_server_returned_answer_with_no_data"),
        ResponseCode::FormErr => Answer::failure("cares_failure:DNS_server_claims_query_was_misformatted"),
        ResponseCode::NotImp => {
            Answer::failure("cares_failure:DNS_server_does_not_implement_requested_operation")
        }
        ResponseCode::Refused => Answer::failure("cares_failure:DNS_server_refused_query"),
        _ => Answer::failure("cares_failure:DNS_server_returned_general_failure"),
    }
}
