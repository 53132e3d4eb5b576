//! What `/clusters` shows, in Envoy's order.

use std::fmt::Write;
use std::sync::Arc;

use crate::circuit::Priority;
use crate::cluster::Cluster;
use crate::manager::Clusters;

impl Clusters {
    /// The text form of `/clusters`.
    pub fn to_text(&self) -> String {
        let mut out = String::new();
        for cluster in self.all() {
            // Writing to a String does not fail.
            let _ = text(&cluster, &mut out);
        }
        out
    }
}

fn text(cluster: &Arc<Cluster>, out: &mut String) -> std::fmt::Result {
    let name = cluster.name();
    writeln!(out, "{name}::observability_name::{}", cluster.observability_name())?;
    for (label, priority) in [("default", Priority::Default), ("high", Priority::High)] {
        let limits = cluster.thresholds(priority);
        for (what, max) in [
            ("connections", limits.max_connections),
            ("pending_requests", limits.max_pending_requests),
            ("requests", limits.max_requests),
            ("retries", limits.max_retries),
        ] {
            writeln!(out, "{name}::{label}_priority::max_{what}::{max}")?;
        }
    }
    writeln!(out, "{name}::added_via_api::{}", cluster.config().added_via_api)?;
    for host in cluster.hosts().hosts() {
        let address = host.address();
        for (stat, value, _) in host.stats.all() {
            writeln!(out, "{name}::{address}::{stat}::{value}")?;
        }
        writeln!(out, "{name}::{address}::hostname::{}", host.hostname)?;
        writeln!(out, "{name}::{address}::health_flags::{}", host.health_flags())?;
        writeln!(out, "{name}::{address}::weight::{}", host.weight)?;
        writeln!(out, "{name}::{address}::region::{}", host.locality.region)?;
        writeln!(out, "{name}::{address}::zone::{}", host.locality.zone)?;
        writeln!(out, "{name}::{address}::sub_zone::{}", host.locality.sub_zone)?;
        writeln!(out, "{name}::{address}::canary::{}", host.canary)?;
        writeln!(out, "{name}::{address}::priority::{}", host.priority)?;
        writeln!(out, "{name}::{address}::success_rate::-1")?;
        writeln!(out, "{name}::{address}::local_origin_success_rate::-1")?;
    }
    Ok(())
}
