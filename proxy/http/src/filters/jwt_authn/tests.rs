use envoy_types::pb::envoy::config::core::v3 as core;
use envoy_types::pb::envoy::config::route::v3 as route;
use envoy_types::pb::envoy::extensions::filters::http::jwt_authn::v3 as pb;
use pb::jwt_requirement::RequiresType;
use sampan_core::header::{HeaderId, HeaderMap, HeaderName};

use super::config::{Model, PerRoute};
use super::locations::Locations;

const KEYS: &str = r#"{"keys":[{"kty":"oct","k":"AAAA"}]}"#;

fn inline(text: &str) -> pb::jwt_provider::JwksSourceSpecifier {
    let specifier = core::data_source::Specifier::InlineString(text.into());
    pb::jwt_provider::JwksSourceSpecifier::LocalJwks(core::DataSource {
        specifier: Some(specifier),
        ..core::DataSource::default()
    })
}

fn provider() -> pb::JwtProvider {
    pb::JwtProvider {
        issuer: "me".into(),
        jwks_source_specifier: Some(inline(KEYS)),
        ..pb::JwtProvider::default()
    }
}

fn with(provider: pb::JwtProvider) -> pb::JwtAuthentication {
    let providers = [("p".to_owned(), provider)].into();
    pb::JwtAuthentication { providers, ..pb::JwtAuthentication::default() }
}

fn rule(requires: RequiresType) -> pb::RequirementRule {
    let prefix = route::route_match::PathSpecifier::Prefix("/".into());
    let requires = pb::JwtRequirement { requires_type: Some(requires) };
    pb::RequirementRule {
        r#match: Some(route::RouteMatch { path_specifier: Some(prefix), ..Default::default() }),
        requirement_type: Some(pb::requirement_rule::RequirementType::Requires(requires)),
    }
}

fn refusal(message: pb::JwtAuthentication) -> String {
    Model::from_proto(message).err().map(|e| e.to_string()).unwrap_or_default()
}

#[test]
fn what_is_refused_is_named() {
    let remote = |uri: &str| {
        let http_uri = core::HttpUri {
            uri: uri.into(),
            timeout: Some(Default::default()),
            http_upstream_type: Some(core::http_uri::HttpUpstreamType::Cluster("c".into())),
        };
        let remote = pb::RemoteJwks { http_uri: Some(http_uri), ..pb::RemoteJwks::default() };
        let source = pb::jwt_provider::JwksSourceSpecifier::RemoteJwks(remote);
        with(pb::JwtProvider { jwks_source_specifier: Some(source), ..provider() })
    };
    assert!(Model::from_proto(remote("https://a:1/b?c")).is_ok());
    let named = |name: &str| rule(RequiresType::ProviderName(name.into()));
    let extract = rule(RequiresType::ExtractOnlyWithoutValidation(Default::default()));
    let one = pb::JwtRequirementOrList { requirements: vec![pb::JwtRequirement::default()] };
    let claim = |claim_name: &str, keys: &[&str]| {
        let segment = |key: &&str| pb::jwt_claim_to_header::PathSegment { key: (*key).to_owned() };
        let claim = pb::JwtClaimToHeader {
            header_name: "x".into(),
            claim_name: claim_name.into(),
            claim_path: keys.iter().map(segment).collect(),
        };
        with(pb::JwtProvider { claim_to_headers: vec![claim], ..provider() })
    };
    assert!(Model::from_proto(claim("a", &[])).is_ok() && Model::from_proto(claim("", &["a"])).is_ok());
    for (message, error) in [
        (
            with(pb::JwtProvider { jwks_source_specifier: None, ..provider() }),
            "providers[\"p\"].jwks_source_specifier: value is required",
        ),
        (
            with(pb::JwtProvider { jwks_source_specifier: Some(inline("{}")), ..provider() }),
            "providers[\"p\"].local_jwks: Provider 'p' in jwt_authn config has invalid local jwks: Jwks does not have [keys] \
             field",
        ),
        (remote("/b"), "providers[\"p\"].remote_jwks.http_uri.uri: Provider 'p' has an invalid URI: '/b'"),
        (
            pb::JwtAuthentication { rules: vec![named("p"), named("q")], ..with(provider()) },
            "rules[1].requires.provider_name: Required provider ['q'] is not configured.",
        ),
        (
            pb::JwtAuthentication { rules: vec![extract], ..with(provider()) },
            "rules[0].requires.extract_only_without_validation: this field is not supported",
        ),
        (
            pb::JwtAuthentication { rules: vec![rule(RequiresType::RequiresAny(one))], ..with(provider()) },
            "rules[0].requires.requires_any.requirements: value must contain at least 2 item(s)",
        ),
        (
            claim("a", &["b"]),
            "providers[\"p\"].claim_to_headers[0]: exactly one of claim_name and claim_path must be set",
        ),
        (
            claim("", &[]),
            "providers[\"p\"].claim_to_headers[0]: exactly one of claim_name and claim_path must be set",
        ),
    ] {
        assert_eq!(refusal(message), error);
    }
    assert!(PerRoute::from_proto(pb::PerRouteConfig::default()).is_err());
}

fn tokens(provider: &pb::JwtProvider, headers: &[(&str, &str)]) -> Vec<String> {
    let mut request = HeaderMap::new();
    headers.iter().for_each(|(name, value)| request.append_name(&HeaderName::new(name), value));
    let locations = Locations::new(std::slice::from_ref(provider));
    locations.tokens(&request).into_iter().map(|token| token.text).collect()
}

#[test]
fn where_tokens_are_found() {
    let usual = provider();
    assert_eq!(tokens(&usual, &[("authorization", "Bearer a.b")]), ["a.b"]);
    assert_eq!(tokens(&usual, &[("authorization", "Bearer  \"a.b\"")]), ["a.b\""]);
    assert_eq!(tokens(&usual, &[("authorization", "x Bearer a")]), ["a"]);
    assert_eq!(
        tokens(&usual, &[("authorization", "Bearer a"), ("authorization", "Bearer b")]),
        ["a,Bearer b"]
    );
    assert!(tokens(&usual, &[("authorization", "bearer a")]).is_empty());
    assert_eq!(tokens(&usual, &[(":path", "/?access_token=a%2eb&access_token=c")]), ["a.b"]);
    let own = pb::JwtProvider {
        from_headers: vec![pb::JwtHeader { name: "X-Jwt".into(), value_prefix: String::new() }],
        from_params: vec!["t".into()],
        from_cookies: vec!["c".into()],
        ..provider()
    };
    let found = tokens(&own, &[("cookie", "c=4"), (":path", "/?t=3"), ("x-jwt", "1"), ("x-jwt", "2")]);
    assert_eq!(found, ["1", "2", "3", "4"]);
    assert!(tokens(&own, &[("authorization", "Bearer a.b")]).is_empty());
}

#[test]
fn a_parameter_goes_and_the_others_stay_as_they_were() {
    for (path, left) in [
        ("/p?access_token=a", "/p"),
        ("/p?b=%26x&access_token=a&a=%0d%0a&c", "/p?b=%26x&a=%0d%0a&c"),
        ("/p?access%5ftoken=a&&x=1", "/p?&x=1"),
    ] {
        let mut request = HeaderMap::new();
        request.append(HeaderId::PATH, path);
        let locations = Locations::new(&[provider()]);
        let tokens = locations.tokens(&request);
        assert_eq!((tokens.len(), tokens[0].text.as_str()), (1, "a"));
        tokens[0].location.remove(&mut request);
        assert_eq!(request.get_str(HeaderId::PATH), Some(left));
    }
}

#[test]
fn a_place_is_for_the_issuers_that_name_it() {
    let other = pb::JwtProvider { issuer: "you".into(), from_params: vec!["t".into()], ..provider() };
    let mut request = HeaderMap::new();
    request.append(HeaderId::PATH, "/?t=a");
    let locations = Locations::new(&[provider(), other.clone()]);
    let token = &locations.tokens(&request)[0];
    assert!(token.location.allows("you") && !token.location.allows("me"));
    let any = pb::JwtProvider { issuer: String::new(), ..other.clone() };
    let locations = Locations::new(&[other, any]);
    assert!(locations.tokens(&request)[0].location.allows("me"));
}
