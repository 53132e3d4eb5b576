//! The home page: a form per endpoint. Plain HTML without script; every text is escaped.

use std::fmt::Write;

use crate::endpoints::{ENDPOINTS, Kind, Param};
use crate::{Admin, HTML, Query, Reply};

const STYLE: &str = "body{font-family:sans-serif}table{border-collapse:collapse}td{padding:4px;\
                     text-align:left}tr:nth-child(even){background:#eee}.option{text-align:right}";

/// Text as HTML: nothing in it is taken for markup, in an attribute neither.
pub(crate) fn escape(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    for c in text.chars() {
        match c {
            '&' => out.push_str("&amp;"),
            '<' => out.push_str("&lt;"),
            '>' => out.push_str("&gt;"),
            '"' => out.push_str("&quot;"),
            '\'' => out.push_str("&#39;"),
            c => out.push(c),
        }
    }
    out
}

/// A page around a body, which must be escaped already.
pub(crate) fn page(body: &str) -> String {
    format!(
        "<!DOCTYPE html>\n<html lang='en'>\n<head>\n  <title>Envoy Admin</title>\n  <style>{STYLE}</style>\n\
         </head>\n<body>\n{body}\n</body>\n</html>\n"
    )
}

pub(crate) fn home(_: &Admin, _: &Query) -> Reply {
    let mut out = String::from("<table class='home-table'>\n<tr><th>Command</th><th>Description</th></tr>\n");
    for endpoint in ENDPOINTS.iter().filter(|e| e.path != "/") {
        let path = escape(endpoint.path.trim_start_matches('/'));
        let help = escape(endpoint.help);
        let method = if endpoint.post { "post" } else { "get" };
        // Writing to a string cannot fail.
        let _ = writeln!(
            out,
            "<tr><td><form action='{path}' method='{method}' id='{path}'><button>{path}</button></form></td>\
             <td>{help}</td></tr>"
        );
        endpoint.params.iter().for_each(|param| field(&mut out, &path, param));
    }
    out.push_str("</table>");
    Reply { status: 200, content_type: HTML, body: page(&out) }
}

fn field(out: &mut String, form: &str, param: &Param) {
    let (name, help) = (escape(param.name), escape(param.help));
    let input = match &param.kind {
        Kind::Flag => format!("<input type='checkbox' name='{name}' form='{form}'>"),
        Kind::Text => format!("<input type='text' name='{name}' form='{form}'>"),
        Kind::OneOf(choices) => {
            let options = choices.iter().map(|c| {
                let c = escape(c);
                format!("<option value='{c}'>{c}</option>")
            });
            format!("<select name='{name}' form='{form}'>{}</select>", options.collect::<String>())
        }
    };
    let _ = writeln!(out, "<tr><td class='option'>{input}</td><td>{help}</td></tr>");
}
