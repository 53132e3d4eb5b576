//! What becomes of a request behind its route: rewrites, redirects, mutations, weighted clusters.

use super::*;

/// Runs a request's side of the route that it finds.
fn forwarded(table: &RouteTable, mut headers: HeaderMap) -> HeaderMap {
    let found = find(table, &headers).unwrap();
    let (host, route) = table.levels(found);
    let route = route.unwrap();
    for level in [&route.mutations, &host.mutations, &table.mutations] {
        level.request.apply_to_request(&mut headers, &info());
    }
    route.action.cluster().unwrap().rewrite(route, &mut headers, &info(), true);
    headers
}

fn rewritten(action: &str, path: &str) -> String {
    let headers = forwarded(&routes(&[action]), request("a", path));
    headers.get_str(HeaderId::PATH).unwrap().to_owned()
}

#[test]
fn a_prefix_rewrite_replaces_what_matched_and_keeps_the_query() {
    let prefix = "{match: {prefix: /pre}, route: {cluster: a, prefix_rewrite: /new}}";
    assert_eq!(rewritten(prefix, "/pre/x?q=/pre"), "/new/x?q=/pre");
    assert_eq!(rewritten(prefix, "/prex"), "/newx");
    let slash = "{match: {prefix: /slash/}, route: {cluster: a, prefix_rewrite: /}}";
    assert_eq!(rewritten(slash, "/slash/x"), "/x");
    let exact = "{match: {path: /whole}, route: {cluster: a, prefix_rewrite: /other}}";
    assert_eq!(rewritten(exact, "/whole?q"), "/other?q");
    let separated = "{match: {path_separated_prefix: /sep}, route: {cluster: a, prefix_rewrite: /s}}";
    assert_eq!(rewritten(separated, "/sep/x"), "/s/x");
    let any_case =
        "{match: {prefix: /Pre, case_sensitive: false}, route: {cluster: a, prefix_rewrite: /new}}";
    assert_eq!(rewritten(any_case, "/pRE/x"), "/new/x");
}

#[test]
fn a_regex_rewrite_works_on_the_path_without_its_query() {
    let regex = "{match: {prefix: /}, route: {cluster: a, \
                 regex_rewrite: {pattern: {regex: \"/(\\\\d+)/([^/]*)\"}, substitution: \"/\\\\2/\\\\1\"}}}";
    assert_eq!(rewritten(regex, "/12/abc?q=/3/d"), "/abc/12?q=/3/d");
    assert_eq!(rewritten(regex, "/1/a/2/b"), "/a/1/b/2");
    assert_eq!(rewritten(regex, "/none"), "/none");
}

fn template(matching: &str, rewrite: &str) -> String {
    format!(
        "{{match: {{path_match_policy: {{name: t, typed_config: {{\
         \"@type\": type.googleapis.com/envoy.extensions.path.match.uri_template.v3.UriTemplateMatchConfig, \
         path_template: \"{matching}\"}}}}}}, route: {{cluster: a, path_rewrite_policy: {{name: r, \
         typed_config: {{\
         \"@type\": type.googleapis.com/envoy.extensions.path.rewrite.uri_template.v3.UriTemplateRewriteConfig, \
         path_template_rewrite: \"{rewrite}\"}}}}}}}}"
    )
}

#[test]
fn templates_match_and_rewrite_as_seen_of_envoy() {
    assert_eq!(rewritten(&template("/t/{x}/{y}", "/{y}/{x}"), "/t/1/2?q=3"), "/2/1?q=3");
    for (matching, path, hit) in [
        ("/t/{x}/*/{y=a*}", "/t/1/2/a", true),
        ("/t/{x}/*/{y=a*}", "/t/1/2/abc", false),
        ("/t/{x}/*/{y=a*}", "/t/1/2/a*", false),
        ("/{x}/b*/c", "/u/bb/c", true),
        ("/{x}/b*/c", "/u/b*/c", false),
        ("/{x}/**/c", "/v/x/y/c", true),
        ("/{x}/**/c", "/v//c", true),
        ("/{x}/**/c", "/v/c", false),
        ("/{x}/**.m3u8", "/w/a/b.m3u8", true),
        ("/{x}/**.m3u8", "/w/a/bxm3u8", false),
    ] {
        let table = routes(&[&template(matching, "/{x}")]);
        assert_eq!(route_of(&table, path).is_some(), hit, "{matching} {path}");
    }
    for wrong in ["t/{x}", "/{x", "/{1x}", "/{x}/a b", "/{x}/{x}"] {
        assert!(compile(&with_routes(&[&template(wrong, "/")])).is_err(), "{wrong}");
    }
    assert!(compile(&with_routes(&[&template("/{x}", "/{y}")])).is_err());
}

#[test]
fn a_host_rewrite_keeps_what_was_there() {
    let table = routes(&[
        "{match: {prefix: /lit}, route: {cluster: a, host_rewrite_literal: lit, append_x_forwarded_host: true}}",
        "{match: {prefix: /hdr}, route: {cluster: a, host_rewrite_header: x-host}}",
        "{match: {prefix: /re}, route: {cluster: a, host_rewrite_path_regex: {pattern: {regex: \"^/re/(.*)$\"}, \
         substitution: \"\\\\1.test\"}}}",
    ]);
    let headers = forwarded(&table, request("a", "/lit"));
    assert_eq!(headers.get(HeaderId::AUTHORITY), Some(&b"lit"[..]));
    assert_eq!(headers.get(HeaderId::X_ENVOY_ORIGINAL_HOST), Some(&b"a"[..]));
    assert_eq!(headers.get(HeaderId::X_FORWARDED_HOST), Some(&b"a"[..]));
    let mut known = request("a", "/lit");
    known.append(HeaderId::X_FORWARDED_HOST, "b, a");
    assert_eq!(forwarded(&table, known).get(HeaderId::X_FORWARDED_HOST), Some(&b"b, a"[..]));
    let headers = forwarded(&table, request("a", "/hdr"));
    assert_eq!(headers.get(HeaderId::AUTHORITY), Some(&b"a"[..]));
    assert!(!headers.contains(HeaderId::X_ENVOY_ORIGINAL_HOST));
    let headers = forwarded(&table, request("a", "/re/x?q"));
    assert_eq!(headers.get(HeaderId::AUTHORITY), Some(&b"x.test"[..]));
}

fn location(redirect: &str, scheme: &str, authority: &str, path: &str) -> String {
    let table = routes(&[&format!("{{match: {{prefix: /p}}, redirect: {{{redirect}}}}}")]);
    let mut headers = request(authority, path);
    headers.set(HeaderId::SCHEME, scheme);
    let (_, route) = table.levels(find(&table, &headers).unwrap());
    let Action::Redirect(redirect) = &route.unwrap().action else { panic!("no redirect") };
    String::from_utf8(redirect.location(route, &headers, &info())).unwrap()
}

#[test]
fn redirects_lead_where_envoy_leads() {
    for (redirect, scheme, authority, path, expected) in [
        ("https_redirect: true", "http", "a", "/p?q", "https://a/p?q"),
        ("https_redirect: true", "http", "a:80", "/p", "https://a/p"),
        ("https_redirect: true", "http", "a:8080", "/p", "https://a:8080/p"),
        ("scheme_redirect: http", "https", "a:443", "/p", "http://a/p"),
        ("https_redirect: true, port_redirect: 8443", "http", "a:80", "/p", "https://a:8443/p"),
        ("host_redirect: b", "http", "a:81", "/p", "http://b/p"),
        ("host_redirect: b, port_redirect: 82", "http", "a:81", "/p", "http://b:82/p"),
        ("path_redirect: /x", "http", "a", "/p?q", "http://a/x?q"),
        ("path_redirect: \"/x?y\"", "http", "a", "/p?q", "http://a/x?y"),
        ("path_redirect: /x, strip_query: true", "http", "a", "/p?q", "http://a/x"),
        ("prefix_rewrite: /x", "http", "a", "/p/r?q", "http://a/x/r?q"),
        (
            "regex_rewrite: {pattern: {regex: r+}, substitution: s}",
            "http",
            "[::1]:80",
            "/p/rr?q=r",
            "http://[::1]:80/p/s?q=r",
        ),
    ] {
        assert_eq!(location(redirect, scheme, authority, path), expected, "{redirect}");
    }
}

#[test]
fn mutations_are_made_of_the_headers_as_they_came() {
    let table = routes(&["{match: {prefix: /}, route: {cluster: a}, request_headers_to_remove: [gone], \
         request_headers_to_add: [\
         {header: {key: h, value: one}}, \
         {header: {key: o, value: \"%REQ(h)%-new\"}, append_action: OVERWRITE_IF_EXISTS_OR_ADD}, \
         {header: {key: h, value: two}, append_action: ADD_IF_ABSENT}, \
         {header: {key: o, value: three}, append_action: ADD_IF_ABSENT}, \
         {header: {key: p, value: four}, append_action: OVERWRITE_IF_EXISTS}, \
         {header: {key: e, value: \"%REQ(none)%\"}}, \
         {header: {key: k, value: \"%REQ(none)%\"}, keep_empty_value: true}]}"]);
    let mut headers = request("a", "/");
    for name in ["o", "gone", "m"] {
        headers.append_name(&HeaderName::new(name), "old");
    }
    let forwarded = forwarded(&table, headers);
    let shown: Vec<_> = forwarded
        .iter()
        .filter(|(_, name, _)| name.len() < 5 && name[0] != b':')
        .map(|(_, name, value)| (std::str::from_utf8(name).unwrap(), std::str::from_utf8(value).unwrap()))
        .collect();
    // What overwrites stands behind what was there, and what is added behind that.
    assert_eq!(shown, [("m", "old"), ("o", "-new"), ("h", "one"), ("h", "two"), ("k", "")]);
}

#[test]
fn weights_share_by_random_number_and_a_header_may_bring_it() {
    let table = routes(&["{match: {prefix: /}, route: {weighted_clusters: {header_name: x-rand, \
         clusters: [{name: a, weight: 40}, {name: c, weight: 0}, {name: b, weight: 60}]}}}"]);
    let mut headers = request("a", "/");
    let (_, route) = table.levels(find(&table, &headers).unwrap());
    let action = route.unwrap().action.cluster().unwrap();
    let runtime = Runtime::default();
    let mut picked = [0u32; 3];
    for random in 0..1000 {
        picked[action.pick(|| random, &headers, &info(), &runtime).unwrap() as usize] += 1;
    }
    assert_eq!(picked, [400, 0, 600]);
    for (value, index) in [("39", 0), ("40", 2), ("139", 0), ("x", 2)] {
        headers.set_name(&HeaderName::new("x-rand"), value);
        assert_eq!(action.pick(|| 99, &headers, &info(), &runtime), Some(index), "{value}");
    }
}
