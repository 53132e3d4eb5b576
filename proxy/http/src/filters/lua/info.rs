//! What scripts learn of stream, connection and route: `streamInfo()`, `connection()`, `metadata()` and their like.

use std::rc::Rc;
use std::sync::Arc;

use envoy_types::pb::google::protobuf::Struct;
use mlua::{Function, Lua, MultiValue, Table, Value};
use sampan_core::stream_info::Metadata as All;

use super::config::PerRoute;
use super::object::{Args, Fail, Kind, Method, Return, internal};
use super::session::{Live, Session};
use super::ssl::Ssl;
use super::value;

/// `next` and a table: what `pairs` walks through.
fn walk(lua: &Lua, table: Table) -> Result<Return, Fail> {
    let next: Function = lua.named_registry_value(super::vm::NEXT).map_err(internal)?;
    Ok(Return::Values(MultiValue::from_vec(vec![Value::Function(next), Value::Table(table)])))
}

/// One struct of metadata.
pub(super) enum Fields {
    None,
    /// That of a name.
    Of(Arc<All>, Box<str>),
    /// A route's `filter_context`.
    Context(Arc<PerRoute>),
}

impl Fields {
    fn get(&self) -> Option<&Struct> {
        match self {
            Self::None => None,
            Self::Of(all, name) => all.get(&**name),
            Self::Context(route) => route.context.as_ref(),
        }
    }

    fn under(all: Option<Arc<All>>, session: &Session) -> Self {
        all.map_or(Self::None, |all| Self::Of(all, (&*session.filter_name).into()))
    }
}

/// The metadata object.
pub(super) struct Metadata(pub(super) Fields);

impl Kind for Metadata {
    const NAME: &'static str = "metadata";
    const METHODS: &'static [(&'static str, Method)] = &[
        ("get", |lua, args| {
            let this = args.this::<Self>()?;
            let key = args.name(1)?;
            match this.own.0.get().and_then(|fields| fields.fields.get(&key)) {
                Some(value) => Return::value(lua, value::to_lua(lua, value).map_err(internal)?),
                None => Return::none(),
            }
        }),
        ("__pairs", |lua, args| {
            let this = args.this::<Self>()?;
            let empty = Struct::default();
            let fields = this.own.0.get().unwrap_or(&empty);
            walk(lua, value::table(lua, fields).map_err(internal)?)
        }),
    ];
}

/// `virtualHost()`
pub(super) struct VirtualHost;

impl Kind for VirtualHost {
    const NAME: &'static str = "virtualHost";
    const METHODS: &'static [(&'static str, Method)] = &[("metadata", |lua, args| {
        let session = args.this::<Self>()?.session.clone();
        let all = session.live()?.facts.host_metadata.clone();
        Return::object(lua, &session, Metadata(Fields::under(all, &session)))
    })];
}

/// `route()`
pub(super) struct RouteOfStream;

impl Kind for RouteOfStream {
    const NAME: &'static str = "route";
    const METHODS: &'static [(&'static str, Method)] = &[("metadata", |lua, args| {
        let session = args.this::<Self>()?.session.clone();
        let all = session.live()?.facts.route_metadata.clone();
        Return::object(lua, &session, Metadata(Fields::under(all, &session)))
    })];
}

/// `streamInfo()`
pub(super) struct StreamInfo;

impl StreamInfo {
    fn text(lua: &Lua, args: &Args, f: impl FnOnce(&Live) -> Option<String>) -> Result<Return, Fail> {
        let this = args.this::<Self>()?;
        let live = this.session.live()?;
        let text = f(&live).unwrap_or_default();
        drop(live);
        Return::value(lua, text)
    }
}

impl Kind for StreamInfo {
    const NAME: &'static str = "streamInfo";
    const METHODS: &'static [(&'static str, Method)] = &[
        ("protocol", |lua, args| {
            Self::text(lua, args, |live| live.facts.protocol.map(|protocol| protocol.as_str().to_owned()))
        }),
        ("routeName", |lua, args| {
            Self::text(lua, args, |live| live.facts.route_name.as_deref().map(str::to_owned))
        }),
        ("virtualClusterName", |lua, args| {
            Self::text(lua, args, |live| live.facts.virtual_cluster.as_deref().map(str::to_owned))
        }),
        ("requestedServerName", |lua, args| {
            Self::text(lua, args, |live| {
                live.facts.connection.requested_server_name.as_deref().map(str::to_owned)
            })
        }),
        ("downstreamLocalAddress", |lua, args| {
            Self::text(lua, args, |live| Some(live.facts.connection.local.to_string()))
        }),
        ("downstreamDirectLocalAddress", |lua, args| {
            Self::text(lua, args, |live| Some(live.facts.connection.local.to_string()))
        }),
        ("downstreamRemoteAddress", |lua, args| {
            Self::text(lua, args, |live| Some(live.facts.remote.to_string()))
        }),
        ("downstreamDirectRemoteAddress", |lua, args| {
            Self::text(lua, args, |live| Some(live.facts.connection.direct_remote.to_string()))
        }),
        ("downstreamSslConnection", |lua, args| ssl(lua, &args.this::<Self>()?.session)),
        ("dynamicMetadata", |lua, args| Return::object(lua, &args.this::<Self>()?.session, DynamicMetadata)),
        // Nothing here writes typed metadata.
        ("dynamicTypedMetadata", |lua, args| {
            args.this::<Self>()?;
            args.bytes(1)?;
            Return::value(lua, Value::Nil)
        }),
        ("filterState", |lua, args| Return::object(lua, &args.this::<Self>()?.session, FilterState)),
    ];
}

fn ssl(lua: &Lua, session: &Rc<Session>) -> Result<Return, Fail> {
    let tls = session.live()?.facts.connection.tls.clone();
    match tls {
        Some(tls) => Return::object(lua, session, Ssl(tls)),
        None => Return::value(lua, Value::Nil),
    }
}

/// `dynamicMetadata()`
pub(super) struct DynamicMetadata;

impl Kind for DynamicMetadata {
    const NAME: &'static str = "dynamicMetadata";
    const METHODS: &'static [(&'static str, Method)] = &[
        ("get", |lua, args| {
            let this = args.this::<Self>()?;
            let name = args.name(1)?;
            let live = this.session.live()?;
            match live.metadata.as_ref().and_then(|all| all.get(&name)) {
                Some(fields) => Return::value(lua, value::table(lua, fields).map_err(internal)?),
                None => Return::none(),
            }
        }),
        ("set", |_, args| {
            let this = args.this::<Self>()?;
            let (name, key) = (args.name(1)?, args.name(2)?);
            let value = value::from_lua(args.value(3).unwrap_or(&Value::Nil))?;
            let mut live = this.session.live()?;
            if live.continued {
                live.late.push((name.clone(), key.clone(), value.clone()));
            }
            let fields = live.metadata.get_or_insert_default().entry(name).or_default();
            fields.fields.insert(key, value);
            Return::none()
        }),
        ("__pairs", |lua, args| {
            let this = args.this::<Self>()?;
            let table = lua.create_table().map_err(internal)?;
            for (name, fields) in this.session.live()?.metadata.iter().flat_map(|all| all.iter()) {
                let fields = value::table(lua, fields).map_err(internal)?;
                table.raw_set(name.as_str(), fields).map_err(internal)?;
            }
            walk(lua, table)
        }),
    ];
}

/// `filterState()`
pub(super) struct FilterState;

impl Kind for FilterState {
    const NAME: &'static str = "filterState";
    const METHODS: &'static [(&'static str, Method)] = &[("get", |lua, args| {
        let this = args.this::<Self>()?;
        let name = args.name(1)?;
        let live = this.session.live()?;
        let own = live.filter_state.as_ref().and_then(|state| state.get(&name).cloned());
        let Some(object) = own.or_else(|| live.facts.connection.state(&name)) else { return Return::none() };
        let text = match args.value(2) {
            None | Some(Value::Nil) => object.plain(),
            Some(_) => object.field(&args.name(2)?),
        };
        Return::text(lua, text.as_ref().map(|text| text.as_bytes()))
    })];
}

/// `connection()`
pub(super) struct Connection;

impl Kind for Connection {
    const NAME: &'static str = "connection";
    const METHODS: &'static [(&'static str, Method)] =
        &[("ssl", |lua, args| ssl(lua, &args.this::<Self>()?.session))];
}

/// `connectionStreamInfo()`: what network filters left in their connection's metadata, which is out of reach here.
pub(super) struct ConnectionStreamInfo;

impl Kind for ConnectionStreamInfo {
    const NAME: &'static str = "connectionStreamInfo";
    const METHODS: &'static [(&'static str, Method)] = &[
        ("dynamicMetadata", |_, args| {
            args.this::<Self>()?;
            Err(Fail::from("connectionStreamInfo():dynamicMetadata() is not supported"))
        }),
        ("dynamicTypedMetadata", |_, args| {
            args.this::<Self>()?;
            Err(Fail::from("connectionStreamInfo():dynamicTypedMetadata() is not supported"))
        }),
    ];
}
