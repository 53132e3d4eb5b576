//! nginx: one process without a master, kept upstream connections, answers never spilled to disk, no log.

use std::fmt::Write as _;

use super::{Front, Setup, Unable, Upstream};

pub(super) fn conf(setup: &Setup) -> Result<String, Unable> {
    if let Front::Xds { .. } = setup.front {
        return Err("does not speak xDS");
    }
    if setup.front == Front::IstioLike {
        return Err("has no such filter chain");
    }
    if setup.front == Front::Tcp {
        return Err("needs the stream module, which stock builds leave out");
    }
    if setup.upstream == Upstream::Http2 {
        return Err("cannot proxy HTTP/2 upstream");
    }
    let dir = setup.dir.display();
    let mut out = format!(
        "daemon off;\nmaster_process off;\nuser root;\npid {dir}/nginx.pid;\nerror_log stderr error;\n\
         worker_rlimit_nofile 20000;\nevents {{ worker_connections 20000; }}\n\
         http {{\naccess_log off;\nkeepalive_timeout 300s;\nkeepalive_requests 1000000000;\n\
         server_names_hash_max_size 65536;\nserver_names_hash_bucket_size 128;\n\
         client_body_temp_path {dir}/body;\nproxy_temp_path {dir}/proxy;\nfastcgi_temp_path {dir}/fcgi;\n\
         uwsgi_temp_path {dir}/uwsgi;\nscgi_temp_path {dir}/scgi;\n\
         proxy_http_version 1.1;\nproxy_set_header Connection \"\";\nproxy_set_header Host $host;\n\
         proxy_set_header X-Forwarded-For $proxy_add_x_forwarded_for;\n\
         proxy_max_temp_file_size 0;\nproxy_buffers 16 16k;\n"
    );
    let (options, tls) = match setup.front {
        Front::Http2 => (" http2", String::new()),
        Front::Tls => (
            " ssl",
            format!(
                "ssl_certificate {dir}/cert.pem; ssl_certificate_key {dir}/key.pem; \
                 ssl_protocols TLSv1.2 TLSv1.3; ssl_session_cache off; "
            ),
        ),
        _ => ("", String::new()),
    };
    let services = match setup.front {
        Front::Services(n) => (0..n).map(|i| (format!("svc-{i}"), format!("svc-{i}.example.com"))).collect(),
        _ => vec![("backend".to_owned(), "_".to_owned())],
    };
    for (upstream, host) in services {
        let _ = write!(
            out,
            "upstream {upstream} {{ server {}; keepalive 128; keepalive_requests 1000000000; }}\n\
             server {{ listen {}{options}; server_name {host}; {tls}\
             location / {{ proxy_pass http://{upstream}; }} }}\n",
            setup.backend, setup.listen
        );
    }
    out.push_str("}\n");
    Ok(out)
}
