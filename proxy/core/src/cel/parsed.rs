//! Parsed expressions (`google.api.expr.v1alpha1.Expr`), as conditions of RBAC policies are.
//!
//! What decides on access may not fail unseen: an attribute that is not made where the rules are asked, a function that
//! could evaluate otherwise here (arithmetic, regular expressions, `size`), a comprehension and whatever is about an
//! attribute's root as a whole are refused by name. What is left to fail when it is evaluated fails in Envoy too: a
//! header that is not there, the peer's certificate of a plain connection.

use cel::IdedExpr;
use cel::common::ast::{CallExpr, Expr, ListExpr, LiteralValue, SelectExpr};
use envoy_types::pb::google::api::expr::v1alpha1::{self as pb, constant::ConstantKind, expr::ExprKind};

use super::{DEEPEST, Expression, ROOTS};
use crate::error::{ConfigError, ConfigResult};

/// The attributes of requests that mean here what they mean in Envoy. Filter state does not: to Envoy it is bytes.
const OF_REQUESTS: [(&str, &[&str]); 3] = [
    (
        "request",
        &[
            "headers",
            "host",
            "id",
            "method",
            "path",
            "protocol",
            "query",
            "referer",
            "scheme",
            "url_path",
            "useragent",
        ],
    ),
    ("metadata", &["filter_metadata"]),
    ("xds", &["filter_chain_name", "route_metadata", "route_name", "virtual_host_name"]),
];
/// The attributes of connections.
const OF_CONNECTIONS: [(&str, &[&str]); 3] = [
    ("source", &["address", "port"]),
    ("destination", &["address", "port"]),
    (
        "connection",
        &[
            "dns_san_local_certificate",
            "dns_san_peer_certificate",
            "id",
            "mtls",
            "requested_server_name",
            "sha256_peer_certificate_digest",
            "subject_local_certificate",
            "subject_peer_certificate",
            "tls_version",
            "uri_san_local_certificate",
            "uri_san_peer_certificate",
        ],
    ),
];

/// Functions and how many operands they have.
const FUNCTIONS: [(&str, usize); 15] = [
    ("_&&_", 2),
    ("_||_", 2),
    ("!_", 1),
    ("_?_:_", 3),
    ("_==_", 2),
    ("_!=_", 2),
    ("_<_", 2),
    ("_<=_", 2),
    ("_>_", 2),
    ("_>=_", 2),
    ("_[_]", 2),
    ("@in", 2),
    ("startsWith", 2),
    ("endsWith", 2),
    ("contains", 2),
];
/// Those that are called on their first operand here.
const METHODS: [&str; 3] = ["startsWith", "endsWith", "contains"];

impl Expression {
    /// From the message; of a request's attributes or only of a connection's.
    pub fn from_proto(message: &pb::Expr, requests: bool) -> ConfigResult<Self> {
        Ok(Self::of(convert(message, requests, 1)?, "condition"))
    }
}

fn unsupported(what: impl std::fmt::Display) -> ConfigError {
    ConfigError::unsupported(format!("{what} in a CEL condition"))
}

fn incomplete() -> ConfigError {
    ConfigError::new("failed to create an expression: Invalid empty expression")
}

fn convert(message: &pb::Expr, requests: bool, depth: usize) -> ConfigResult<IdedExpr> {
    if depth > DEEPEST {
        return Err(ConfigError::new(format!("a CEL condition of more than {DEEPEST} levels")));
    }
    let expr = match message.expr_kind.as_ref().ok_or_else(incomplete)? {
        ExprKind::ConstExpr(constant) => Expr::Literal(literal(constant)?),
        ExprKind::IdentExpr(ident) if ROOTS.contains(&ident.name.as_str()) => {
            return Err(unsupported(format!("the whole of {:?}", ident.name)));
        }
        ExprKind::IdentExpr(ident) => return Err(unsupported(format!("the name {:?}", ident.name))),
        ExprKind::SelectExpr(select) => {
            let operand = select.operand.as_deref().ok_or_else(incomplete)?;
            let operand = match root(operand) {
                Some(root) => attribute(root, &select.field, requests)?,
                None => convert(operand, requests, depth + 1)?,
            };
            let (field, test) = (select.field.clone(), select.test_only);
            Expr::Select(SelectExpr { operand: Box::new(operand), field, test })
        }
        ExprKind::CallExpr(call) => Expr::Call(self::call(call, requests, depth)?),
        ExprKind::ListExpr(list) if list.optional_indices.is_empty() => {
            let elements = list.elements.iter().map(|element| convert(element, requests, depth + 1));
            Expr::List(ListExpr::new(elements.collect::<ConfigResult<_>>()?))
        }
        ExprKind::ListExpr(_) => return Err(unsupported("an optional element")),
        ExprKind::StructExpr(_) => return Err(unsupported("a map or message")),
        ExprKind::ComprehensionExpr(_) => return Err(unsupported("a comprehension")),
    };
    Ok(IdedExpr { id: message.id.cast_unsigned(), expr })
}

/// The name of an attribute's root, if that is all there is.
fn root(message: &pb::Expr) -> Option<&str> {
    match message.expr_kind.as_ref()? {
        ExprKind::IdentExpr(ident) => Some(&ident.name),
        _ => None,
    }
}

fn attribute(root: &str, field: &str, requests: bool) -> ConfigResult<IdedExpr> {
    let of_requests = OF_REQUESTS.iter().filter(|_| requests);
    let known = OF_CONNECTIONS
        .iter()
        .chain(of_requests)
        .any(|(name, fields)| *name == root && fields.contains(&field));
    if !known {
        return Err(unsupported(format!(
            "the attribute {root}.{field}{}",
            if requests { "" } else { " of a connection" }
        )));
    }
    Ok(IdedExpr { id: 0, expr: Expr::Ident(root.to_owned()) })
}

fn call(message: &pb::expr::Call, requests: bool, depth: usize) -> ConfigResult<CallExpr> {
    // Names of older parsers.
    let name = match message.function.as_str() {
        "_in_" | "in" => "@in",
        name => name,
    };
    let operands: Vec<&pb::Expr> = message.target.as_deref().into_iter().chain(&message.args).collect();
    if !FUNCTIONS.contains(&(name, operands.len())) {
        return Err(unsupported(format!("the function {name:?} of {} operands", operands.len())));
    }
    let method = METHODS.contains(&name);
    if message.target.is_some() && !method {
        return Err(unsupported(format!("{name:?} called on an operand")));
    }
    let mut args = Vec::with_capacity(operands.len());
    if name == "_[_]"
        && let (Some(root), Some(field)) = (root(operands[0]), text(operands[1]))
    {
        args.push(attribute(root, field, requests)?);
    }
    for operand in &operands[args.len()..] {
        args.push(convert(operand, requests, depth + 1)?);
    }
    let target = method.then(|| Box::new(args.remove(0)));
    Ok(CallExpr { func_name: name.to_owned(), target, args })
}

/// A literal text.
fn text(message: &pb::Expr) -> Option<&str> {
    match message.expr_kind.as_ref()? {
        ExprKind::ConstExpr(pb::Constant { constant_kind: Some(ConstantKind::StringValue(text)) }) => {
            Some(text)
        }
        _ => None,
    }
}

#[allow(deprecated, reason = "times are deprecated constants, and refused")]
fn literal(constant: &pb::Constant) -> ConfigResult<LiteralValue> {
    Ok(match constant.constant_kind.as_ref().ok_or_else(incomplete)? {
        ConstantKind::NullValue(_) => LiteralValue::Null,
        ConstantKind::BoolValue(value) => LiteralValue::Boolean((*value).into()),
        ConstantKind::Int64Value(value) => LiteralValue::Int((*value).into()),
        ConstantKind::Uint64Value(value) => LiteralValue::UInt((*value).into()),
        ConstantKind::DoubleValue(value) => LiteralValue::Double((*value).into()),
        ConstantKind::StringValue(value) => LiteralValue::String(value.clone().into()),
        ConstantKind::BytesValue(value) => LiteralValue::Bytes(value.to_vec().into()),
        ConstantKind::DurationValue(_) | ConstantKind::TimestampValue(_) => {
            return Err(unsupported("a time"));
        }
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Of a name (`$a.b`, `$?a.b` for `has`), a constant, or a function and its operands.
    fn message(of: serde_json::Value) -> ConfigResult<Expression> {
        Expression::from_proto(&tree(&of), true)
    }

    fn tree(of: &serde_json::Value) -> pb::Expr {
        let of_text = |text: &str| ConstantKind::StringValue(text.to_owned());
        let kind = match of {
            serde_json::Value::String(text) => match text.strip_prefix('$') {
                Some(path) => {
                    let (path, test_only) = path.strip_prefix('?').map_or((path, false), |path| (path, true));
                    match path.rsplit_once('.') {
                        None => ExprKind::IdentExpr(pb::expr::Ident { name: path.to_owned() }),
                        Some((operand, field)) => ExprKind::SelectExpr(Box::new(pb::expr::Select {
                            operand: Some(Box::new(tree(&format!("${operand}").into()))),
                            field: field.to_owned(),
                            test_only,
                        })),
                    }
                }
                None => ExprKind::ConstExpr(pb::Constant { constant_kind: Some(of_text(text)) }),
            },
            serde_json::Value::Bool(value) => {
                ExprKind::ConstExpr(pb::Constant { constant_kind: Some(ConstantKind::BoolValue(*value)) })
            }
            serde_json::Value::Array(all) => ExprKind::CallExpr(Box::new(pb::expr::Call {
                function: all[0].as_str().unwrap().to_owned(),
                args: all[1..].iter().map(tree).collect(),
                ..pb::expr::Call::default()
            })),
            _ => return pb::Expr::default(),
        };
        pb::Expr { expr_kind: Some(kind), ..pb::Expr::default() }
    }

    #[test]
    fn what_could_fail_unseen_is_refused() {
        let yes = serde_json::json!(true);
        for (given, taken) in [
            (serde_json::json!(["_==_", "$request.method", "GET"]), true),
            (serde_json::json!(["_[_]", "$request.headers", "x"]), true),
            (serde_json::json!(["_[_]", "$request", "method"]), true),
            (serde_json::json!("$?request.referer"), true),
            (serde_json::json!(["startsWith", "$source.address", "10."]), true),
            (serde_json::json!("$request.time"), false),
            (serde_json::json!(["_[_]", "$request", "time"]), false),
            (serde_json::json!(["_[_]", "$request", ["_[_]", "$request.headers", "x"]]), false),
            (serde_json::json!(["@in", "method", "$request"]), false),
            (serde_json::json!("$request"), false),
            (serde_json::json!("$filter_state.x"), false),
            (serde_json::json!("$other"), false),
            (serde_json::json!(["matches", "$request.path", "a"]), false),
            (serde_json::json!(["_+_", "a", "b"]), false),
            (serde_json::json!(["_&&_", true]), false),
            (serde_json::json!(null), false),
            ((0..=DEEPEST).fold(yes.clone(), |inner, _| serde_json::json!(["!_", inner])), false),
            ((0..DEEPEST - 1).fold(yes, |inner, _| serde_json::json!(["!_", inner])), true),
        ] {
            assert_eq!(message(given.clone()).is_ok(), taken, "{given}");
        }
        let method = tree(&serde_json::json!("$request.method"));
        assert!(Expression::from_proto(&method, false).is_err());
        let server_name = tree(&serde_json::json!("$connection.requested_server_name"));
        assert!(Expression::from_proto(&server_name, false).is_ok());
    }
}
