use std::rc::Rc;

use envoy_types::pb::envoy::config::core::v3::CidrRange;
use envoy_types::pb::envoy::config::route::v3::HeaderMatcher;
use envoy_types::pb::envoy::r#type::matcher::v3::{StringMatcher, string_matcher::MatchPattern};
use pb::permission::Rule as Permission;
use pb::principal::Identifier as Principal;

use super::*;
use crate::Address;
use crate::header::HeaderId;
use crate::stream_info::{CertInfo, ConnectionInfo, TlsInfo};

fn connection() -> ConnectionInfo {
    let address = |text: &str| Address::Ip(text.parse().unwrap());
    ConnectionInfo {
        remote: address("10.0.0.1:4000"),
        ..ConnectionInfo::accepted(1, "l".into(), address("10.0.0.2:8080"), address("10.0.0.9:5000"))
    }
}

fn exact(text: &str) -> StringMatcher {
    StringMatcher { match_pattern: Some(MatchPattern::Exact(text.into())), ignore_case: false }
}

fn policy(permission: Permission, principal: Principal) -> pb::Policy {
    pb::Policy {
        permissions: vec![pb::Permission { rule: Some(permission) }],
        principals: vec![pb::Principal { identifier: Some(principal) }],
        ..Default::default()
    }
}

fn rules(action: pb::rbac::Action, policies: &[(&str, pb::Policy)]) -> Rules {
    let policies = policies.iter().map(|(name, policy)| ((*name).to_owned(), policy.clone())).collect();
    let message = pb::Rbac { action: action.into(), policies, audit_logging_options: None };
    Rules::from_proto(&message, None).unwrap()
}

fn decide<'a>(rules: &'a Rules, info: &StreamInfo, headers: &HeaderMap) -> Decision<'a> {
    rules.decide(Facts { headers, info, route: false, bare_path: None })
}

fn principal_matches(principal: Principal, connection: ConnectionInfo) -> bool {
    let rules = rules(pb::rbac::Action::Allow, &[("p", policy(Permission::Any(true), principal))]);
    let info = StreamInfo::new(1, Rc::new(connection), None);
    decide(&rules, &info, &HeaderMap::new()).allowed
}

#[test]
fn actions_and_the_order_of_policies() {
    let header =
        |name: &str| Permission::Header(HeaderMatcher { name: name.to_owned(), ..Default::default() });
    let policies = [
        ("b", policy(header("x-b"), Principal::Any(true))),
        ("a", policy(header("x-a"), Principal::Any(true))),
    ];
    let info = StreamInfo::new(1, Rc::new(connection()), None);
    let mut both = HeaderMap::new();
    both.append_name(&crate::HeaderName::new("x-b"), b"1");
    both.append_name(&crate::HeaderName::new("x-a"), b"1");
    use pb::rbac::Action::{Allow, Deny, Log};
    for (action, matched, missed) in [(Allow, true, false), (Deny, false, true), (Log, true, true)] {
        let rules = rules(action, &policies);
        let decision = decide(&rules, &info, &both);
        assert_eq!((decision.allowed, decision.policy), (matched, Some("a")));
        let decision = decide(&rules, &info, &HeaderMap::new());
        assert_eq!((decision.allowed, decision.policy), (missed, None));
        assert_eq!(decision.log, (action == Log).then_some(false));
    }
    assert!(!decide(&rules(Allow, &[]), &info, &both).allowed);
}

#[test]
#[allow(deprecated)] // `source_ip`, which Envoy still takes.
fn each_address_is_its_own() {
    let range = |ip: &str| CidrRange {
        address_prefix: ip.to_owned(),
        prefix_len: Some(envoy_types::pb::google::protobuf::UInt32Value { value: 32 }),
    };
    let info = StreamInfo {
        remote: Address::Ip("1.2.3.4:0".parse().unwrap()),
        ..StreamInfo::new(1, Rc::new(connection()), None)
    };
    for (principal, expected) in [
        (Principal::SourceIp(range("10.0.0.1")), true),
        (Principal::SourceIp(range("1.2.3.4")), false),
        (Principal::DirectRemoteIp(range("10.0.0.9")), true),
        (Principal::DirectRemoteIp(range("10.0.0.1")), false),
        (Principal::RemoteIp(range("1.2.3.4")), true),
        (Principal::RemoteIp(range("10.0.0.1")), false),
    ] {
        let rules =
            rules(pb::rbac::Action::Allow, &[("p", policy(Permission::Any(true), principal.clone()))]);
        assert_eq!(decide(&rules, &info, &HeaderMap::new()).allowed, expected, "{principal:?}");
    }
    let pipe = ConnectionInfo { remote: Address::Pipe("".into()), ..connection() };
    let nowhere = CidrRange { address_prefix: "0.0.0.0".into(), prefix_len: None };
    assert!(!principal_matches(Principal::SourceIp(nowhere), pipe));
}

#[test]
fn who_is_authenticated() {
    let named = |name: Option<&str>| {
        Principal::Authenticated(pb::principal::Authenticated { principal_name: name.map(exact) })
    };
    let tls = |peer: Option<CertInfo>| ConnectionInfo {
        tls: Some(Rc::new(TlsInfo { peer: peer.map(Arc::new), ..Default::default() })),
        ..connection()
    };
    let cert = || CertInfo {
        subject: "CN=s".into(),
        uri_sans: vec!["spiffe://a".into(), "spiffe://b".into()],
        dns_sans: vec!["d".into()],
        ..Default::default()
    };
    assert!(!principal_matches(named(None), connection()));
    assert!(!principal_matches(named(Some("")), connection()));
    assert!(principal_matches(named(None), tls(None)));
    assert!(principal_matches(named(Some("")), tls(None)));
    assert!(!principal_matches(named(Some("")), tls(Some(cert()))));
    for name in ["spiffe://a", "spiffe://b", "d", "CN=s"] {
        assert!(principal_matches(named(Some(name)), tls(Some(cert()))), "{name}");
    }
    assert!(!principal_matches(named(Some("spiffe://c")), tls(Some(cert()))));
}

#[test]
fn what_is_not_understood_is_refused() {
    let refused = |policy: pb::Policy| {
        let message = pb::Rbac { policies: [("p".to_owned(), policy)].into(), ..Default::default() };
        Rules::from_proto(&message, None).err().unwrap().path().to_owned()
    };
    let good = || policy(Permission::Any(true), Principal::Any(true));
    assert_eq!(
        refused(pb::Policy { condition: Some(Default::default()), ..good() }),
        "policies[\"p\"].condition"
    );
    assert_eq!(refused(pb::Policy { permissions: Vec::new(), ..good() }), "policies[\"p\"].permissions");
    let custom = policy(Permission::Any(true), Principal::Custom(Default::default()));
    assert_eq!(refused(custom), "policies[\"p\"].principals[0].custom");
    let matcher = policy(Permission::Matcher(Default::default()), Principal::Any(true));
    assert_eq!(refused(matcher), "policies[\"p\"].permissions[0].matcher");
    let template = policy(Permission::UriTemplate(Default::default()), Principal::Any(true));
    assert_eq!(refused(template), "policies[\"p\"].permissions[0].uri_template");
}

#[test]
fn a_path_is_without_its_query_and_must_be_there() {
    use envoy_types::pb::envoy::r#type::matcher::v3::{PathMatcher, path_matcher::Rule};
    let path = Permission::UrlPath(PathMatcher { rule: Some(Rule::Path(exact("/a"))) });
    let not = Permission::NotRule(Box::new(pb::Permission { rule: Some(path.clone()) }));
    let info = StreamInfo::new(1, Rc::new(connection()), None);
    let mut headers = HeaderMap::new();
    let allowed = |rule: &Permission, headers: &HeaderMap| {
        let rules = rules(pb::rbac::Action::Allow, &[("p", policy(rule.clone(), Principal::Any(true)))]);
        decide(&rules, &info, headers).allowed
    };
    assert!(!allowed(&path, &headers) && allowed(&not, &headers));
    headers.append(HeaderId::PATH, "/a?b#c");
    assert!(allowed(&path, &headers) && !allowed(&not, &headers));
}

#[test]
fn details_have_no_white_space() {
    assert_eq!(denied_details(Some("a b\tc")), "rbac_access_denied_matched_policy[a_b_c]");
    assert_eq!(denied_details(None), "rbac_access_denied_matched_policy[none]");
}
