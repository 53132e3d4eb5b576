//! HAProxy: one thread, descriptors for 6,000 connections (two each and the splice pipes; it refuses to start above the limit),
//! one process, idle server connections always reused, splicing for TCP answers, no log.

use std::fmt::Write as _;

use super::{Front, Setup, Unable, Upstream};

pub(super) fn cfg(setup: &Setup) -> Result<String, Unable> {
    if let Front::Xds { .. } = setup.front {
        return Err("does not speak xDS");
    }
    if setup.front == Front::IstioLike {
        return Err("has no such filter chain");
    }
    let mode = if setup.front == Front::Tcp { "tcp" } else { "http" };
    let mut out = format!(
        "global\n  nbthread 1\n  maxconn 6000\n  tune.ssl.cachesize 0\n\
         defaults\n  mode {mode}\n  timeout connect 5s\n  timeout client 300s\n  timeout server 300s\n"
    );
    if mode == "http" {
        out.push_str("  http-reuse always\n  option forwardfor\n");
    } else {
        out.push_str("  option splice-response\n");
    }
    let options = match setup.front {
        Front::Http2 => " proto h2".to_owned(),
        Front::Tls => format!(" ssl crt {}/both.pem", setup.dir.display()),
        _ => String::new(),
    };
    let _ = write!(out, "frontend front\n  bind {}{options}\n", setup.listen);
    let server = match setup.upstream {
        Upstream::Http2 => format!("  server s {} proto h2\n", setup.backend),
        Upstream::Http1 | Upstream::Tcp => format!("  server s {}\n", setup.backend),
    };
    if let Front::Services(n) = setup.front {
        // The name of the backend is the host: one lookup, as a map would be.
        out.push_str("  use_backend %[req.hdr(host),lower]\n");
        for i in 0..n {
            let _ = write!(out, "backend svc-{i}.example.com\n{server}");
        }
    } else {
        let _ = write!(out, "  default_backend backend\nbackend backend\n{server}");
    }
    Ok(out)
}
