// istiod for the tests: Istio's own server, started on files without Kubernetes.
//
// pilot-discovery of Istio 1.30 and later does not start so: its registry of ServiceEntries wants the namespaces of a cluster and
// finds that no controller of clusters was made. Here one is made, of a cluster that is empty and in memory. All else is as
// `pilot-discovery discovery` does it, whose flags these are, as far as the tests use them.
package main

import (
	"flag"
	"log"
	"os"
	"os/signal"
	"reflect"
	"syscall"

	"istio.io/istio/pilot/pkg/bootstrap"
	"istio.io/istio/pilot/pkg/features"
	"istio.io/istio/pkg/cluster"
	"istio.io/istio/pkg/kube"
	"istio.io/istio/pkg/kube/multicluster"
)

func main() {
	if len(os.Args) < 2 || os.Args[1] != "discovery" {
		log.Fatal("usage: pilot-discovery discovery [flags]")
	}
	args := parse(os.Args[2:])
	client := kube.NewFakeClient()
	clusters := multicluster.NewController(multicluster.ControllerOptions{
		Client:          client,
		ClusterID:       cluster.ID(features.ClusterName),
		SystemNamespace: args.Namespace,
	})
	server, err := bootstrap.NewServer(args, func(server *bootstrap.Server) {
		// No option sets it, and a Server with a client of its own would want more of Kubernetes than this.
		field := reflect.ValueOf(server).Elem().FieldByName("multiclusterController")
		reflect.NewAt(field.Type(), field.Addr().UnsafePointer()).Elem().Set(reflect.ValueOf(clusters))
	})
	if err != nil {
		log.Fatal(err)
	}
	stop := make(chan struct{})
	client.RunAndWait(stop)
	if err := clusters.Run(stop); err != nil {
		log.Fatal(err)
	}
	if err := server.Start(stop); err != nil {
		log.Fatal(err)
	}
	signals := make(chan os.Signal, 1)
	signal.Notify(signals, syscall.SIGINT, syscall.SIGTERM)
	<-signals
	close(stop)
	server.WaitUntilCompletion()
}

func parse(arguments []string) *bootstrap.PilotArgs {
	args := bootstrap.NewPilotArgs(func(args *bootstrap.PilotArgs) {
		args.RegistryOptions.KubeOptions.ClusterID = cluster.ID(features.ClusterName)
	})
	flags := flag.NewFlagSet("discovery", flag.ExitOnError)
	flags.Func("registries", "must be empty: there is no Kubernetes", func(value string) error {
		args.RegistryOptions.Registries = nil
		return nil
	})
	for name, value := range map[string]*string{
		"configDir":      &args.RegistryOptions.FileDir,
		"meshConfig":     &args.MeshConfigFile,
		"domain":         &args.RegistryOptions.KubeOptions.DomainSuffix,
		"httpAddr":       &args.ServerOptions.HTTPAddr,
		"httpsAddr":      &args.ServerOptions.HTTPSAddr,
		"grpcAddr":       &args.ServerOptions.GRPCAddr,
		"secureGRPCAddr": &args.ServerOptions.SecureGRPCAddr,
		"monitoringAddr": &args.ServerOptions.MonitoringAddr,
	} {
		flags.StringVar(value, name, *value, "as of pilot-discovery")
	}
	_ = flags.Parse(arguments)
	return args
}
