use std::rc::Rc;
use std::time::Duration;

use envoy_types::pb::envoy::config::cluster::v3 as cluster_pb;
use envoy_types::pb::envoy::config::core::v3 as core_pb;
use sampan_core::stats::Store;

use crate::config::ClusterConfig;
use crate::lb::LbContext;
use crate::manager::ClusterManager;
use crate::testing::{address_of, message, run, upstream, world};

/// What a cluster costs that nobody uses: the model, the host, the slot.
#[test]
fn an_unused_cluster_is_small() {
    let resident = || {
        let pages = std::fs::read_to_string("/proc/self/statm").unwrap();
        pages.split(' ').nth(1).unwrap().parse::<usize>().unwrap() * 4096
    };
    let manager = ClusterManager::new(&Store::new().root(), Default::default());
    let before = resident();
    for i in 0..2000 {
        let mut message = message(80);
        message.name = format!("cluster_{i}");
        manager.add(ClusterConfig::from_proto(&message, false).unwrap()).unwrap();
    }
    let each = resident().saturating_sub(before) / 2000;
    assert!(each < 4096, "{each} bytes each");
    assert!(manager.clusters().all().iter().all(|c| !c.is_used()));
}

#[test]
fn a_name_becomes_hosts_that_stay() {
    run(async {
        let mut message = message(upstream(100).await);
        message.cluster_discovery_type = Some(cluster_pb::cluster::ClusterDiscoveryType::Type(
            cluster_pb::cluster::DiscoveryType::StrictDns.into(),
        ));
        message.dns_lookup_family = cluster_pb::cluster::DnsLookupFamily::V4Only.into();
        #[allow(deprecated)]
        {
            message.dns_refresh_rate =
                Some(envoy_types::pb::google::protobuf::Duration { seconds: 0, nanos: 20_000_000 });
        }
        let core_pb::address::Address::SocketAddress(socket) = address_of(&mut message) else {
            panic!("no socket address")
        };
        socket.address = "localhost".into();
        let world = world(&message);
        world.manager.initialised().await;
        let before = world.host();
        assert_eq!(&*before.host.hostname, "localhost");
        assert_eq!(before.host.address().ip().unwrap().to_string(), "127.0.0.1");
        sampan_core::time::sleep(Duration::from_millis(100)).await;
        let stats = world.stats();
        assert!(stats.update_success.value() > 1);
        assert_eq!(stats.update_no_rebuild.value(), stats.update_success.value() - 1);
        assert_eq!((stats.membership_change.value(), stats.membership_total.value()), (1, 1));
        assert!(Rc::ptr_eq(&before, &world.host()));
        world.worker.get("c").unwrap().cluster().set_resolved(0, 0, Vec::new());
        assert!(world.worker.get("c").unwrap().pick(&LbContext::default()).is_none());
        assert_eq!(stats.membership_total.value(), 0);
    });
}
