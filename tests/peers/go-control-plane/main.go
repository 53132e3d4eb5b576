// A real control plane for the tests: go-control-plane's caches and servers, and around them what a test needs, namely a
// record of every message that a proxy sent, and trouble on demand.
//
//	control-plane -grpc 127.0.0.1:18000 -rest 127.0.0.1:18001 -control 127.0.0.1:18002 [-ads] [-mux] [-resources FOLDER]
//	control-plane dump -address 127.0.0.1:15010 -node node.json [-delta] -out FOLDER
//
// One process serves every mode at once: ADS and per-type streams, state of the world and delta, and REST. Which one is used is
// what the proxy's bootstrap says; -ads only tells the cache to wait until all that was asked for is there.
//
// The control port:
//
//	PUT /snapshot   {version, versions: {cds: …}, resources: […]} as YAML or JSON takes the place of what was served
//	POST /reload    reads the folder again
//	PUT /trouble    {hang, close, garbage, malformed, refuse, repeat, delay_ms, types: [cds]}; {} ends it
//	POST /send      {type, version, nonce, resources} or {…, delta} goes out on every open stream, asked for or not
//	PUT /load_stats {clusters: […], load_reporting_interval: 1s, …} is what the load reporting service answers
//	POST /close     ends every open stream
//	GET /log        what was received and sent, by type
package main

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"flag"
	"fmt"
	"log"
	"net"
	"net/http"
	"os"
	"strings"
	"time"

	cluster "github.com/envoyproxy/go-control-plane/envoy/service/cluster/v3"
	discovery "github.com/envoyproxy/go-control-plane/envoy/service/discovery/v3"
	endpoint "github.com/envoyproxy/go-control-plane/envoy/service/endpoint/v3"
	extension "github.com/envoyproxy/go-control-plane/envoy/service/extension/v3"
	listener "github.com/envoyproxy/go-control-plane/envoy/service/listener/v3"
	lrs "github.com/envoyproxy/go-control-plane/envoy/service/load_stats/v3"
	route "github.com/envoyproxy/go-control-plane/envoy/service/route/v3"
	runtime "github.com/envoyproxy/go-control-plane/envoy/service/runtime/v3"
	secret "github.com/envoyproxy/go-control-plane/envoy/service/secret/v3"
	logger "github.com/envoyproxy/go-control-plane/pkg/log"
	"github.com/envoyproxy/go-control-plane/pkg/server/delta/v3"
	"github.com/envoyproxy/go-control-plane/pkg/server/sotw/v3"
	xds "github.com/envoyproxy/go-control-plane/pkg/server/v3"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials"
)

type flags struct {
	grpc, rest, control, resources string
	ads, mux                       bool
	heartbeat                      time.Duration
	cert, key, ca                  string
}

func main() {
	if len(os.Args) > 1 && os.Args[1] == "dump" {
		if err := dump(os.Args[2:]); err != nil {
			log.Fatal(err)
		}
		return
	}
	var f flags
	flag.StringVar(&f.grpc, "grpc", "", "address for gRPC: HOST:PORT or unix:PATH")
	flag.StringVar(&f.rest, "rest", "", "address for REST")
	flag.StringVar(&f.control, "control", "", "address of the control port")
	flag.StringVar(&f.resources, "resources", "", "folder of YAML and JSON files with the first snapshot")
	flag.BoolVar(&f.ads, "ads", false, "answer only when every resource asked for is there")
	flag.BoolVar(&f.mux, "mux", false, "serve endpoints one by one, from a cache of their own")
	flag.DurationVar(&f.heartbeat, "heartbeat", 0, "renew resources that have a TTL this often")
	flag.StringVar(&f.cert, "tls-cert", "", "certificate chain; makes gRPC and REST use TLS")
	flag.StringVar(&f.key, "tls-key", "", "private key")
	flag.StringVar(&f.ca, "tls-client-ca", "", "demand client certificates of this authority")
	flag.Parse()
	if err := serve(f); err != nil {
		log.Fatal(err)
	}
}

func serve(f flags) error {
	ctx := context.Background()
	state := newState(ctx, f)
	if f.resources != "" {
		if err := state.load(f.resources); err != nil {
			return err
		}
	}
	nothing := logger.LoggerFuncs{}
	server := xds.NewServer(ctx, state.cache(), silent{}, sotw.WithOrderedADS(), sotw.WithLogger(nothing), delta.WithLogger(nothing))
	secure, err := tlsConfig(f)
	if err != nil {
		return err
	}
	options := []grpc.ServerOption{
		grpc.StreamInterceptor(state.record.intercept),
		grpc.ForceServerCodecV2(rawCodec{}),
		grpc.MaxRecvMsgSize(1 << 30), grpc.MaxSendMsgSize(1 << 30),
	}
	if secure != nil {
		options = append(options, grpc.Creds(credentials.NewTLS(secure)))
	}
	streams := grpc.NewServer(options...)
	discovery.RegisterAggregatedDiscoveryServiceServer(streams, server)
	cluster.RegisterClusterDiscoveryServiceServer(streams, server)
	endpoint.RegisterEndpointDiscoveryServiceServer(streams, server)
	listener.RegisterListenerDiscoveryServiceServer(streams, server)
	route.RegisterRouteDiscoveryServiceServer(streams, server)
	route.RegisterScopedRoutesDiscoveryServiceServer(streams, server)
	route.RegisterVirtualHostDiscoveryServiceServer(streams, server)
	secret.RegisterSecretDiscoveryServiceServer(streams, server)
	runtime.RegisterRuntimeDiscoveryServiceServer(streams, server)
	extension.RegisterExtensionConfigDiscoveryServiceServer(streams, server)
	lrs.RegisterLoadReportingServiceServer(streams, state.loads)

	ended := make(chan error)
	if f.grpc != "" {
		socket, err := listen(f.grpc)
		if err != nil {
			return err
		}
		go func() { ended <- streams.Serve(socket) }()
	}
	if f.rest != "" {
		socket, err := listen(f.rest)
		if err != nil {
			return err
		}
		if secure != nil {
			socket = tls.NewListener(socket, secure)
		}
		go func() { ended <- http.Serve(socket, state.record.rest(server)) }()
	}
	socket, err := listen(f.control)
	if err != nil {
		return err
	}
	go func() { ended <- http.Serve(socket, state.control()) }()
	fmt.Println("ready")
	os.Stdout = os.Stderr // whoever waited for that line has stopped reading
	return <-ended
}

// silent has no callbacks: the record sees the messages before the server changes them.
type silent struct{ xds.CallbackFuncs }

func listen(address string) (net.Listener, error) {
	if path, unix := strings.CutPrefix(address, "unix:"); unix {
		_ = os.Remove(path)
		return net.Listen("unix", path)
	}
	return net.Listen("tcp", address)
}

func tlsConfig(f flags) (*tls.Config, error) {
	if f.cert == "" {
		return nil, nil
	}
	pair, err := tls.LoadX509KeyPair(f.cert, f.key)
	if err != nil {
		return nil, err
	}
	config := &tls.Config{Certificates: []tls.Certificate{pair}, NextProtos: []string{"h2", "http/1.1"}}
	if f.ca != "" {
		text, err := os.ReadFile(f.ca)
		if err != nil {
			return nil, err
		}
		config.ClientCAs = x509.NewCertPool()
		if !config.ClientCAs.AppendCertsFromPEM(text) {
			return nil, errors.New("no certificate in " + f.ca)
		}
		config.ClientAuth = tls.RequireAndVerifyClientCert
	}
	return config, nil
}
