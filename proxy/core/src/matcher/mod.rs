//! Matchers: models made once from their messages, asked per request.
//!
//! Three rules hold for all of them. They read **bytes**: a header that is not UTF-8 is matched as it came, so no
//! odd byte turns a denying rule off. A repeated header is **all its values joined by `,`**, as Envoy reads it.
//! They **never fail open**: what cannot be evaluated does not match, and `invert` is applied only to what was
//! evaluated where Envoy does so.
//!
//! Source: Envoy's `type.matcher.v3` messages, `route.v3.HeaderMatcher` and `route.v3.QueryParameterMatcher`.

mod cidr;
mod connection;
mod cookie;
mod header;
mod query;
mod regex;
mod request;
mod string;
mod syntax;
pub mod tree;
mod value;

pub use cidr::{CidrRange, CidrSet};
pub use connection::ConnectionInput;
pub use cookie::{CookieMatcher, cookie_value};
pub use header::{HeaderMatcher, all_headers_match};
pub use query::{
    QueryParameterMatcher, decoded_query_parameter, percent_decoded, query_of, query_parameter,
    query_parameters,
};
pub use regex::{Regex, RegexRewrite};
pub use request::{RequestFacts, RequestInput};
pub use string::{PathMatcher, StringMatcher};
pub use value::{FilterStateMatcher, MetadataMatcher, NumberMatcher, ValueMatcher, metadata_value};
