package main

import (
	"context"
	"crypto/tls"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"sort"
	"strings"
	"time"
	"unicode"
	"unicode/utf8"

	cluster "github.com/envoyproxy/go-control-plane/envoy/config/cluster/v3"
	core "github.com/envoyproxy/go-control-plane/envoy/config/core/v3"
	listener "github.com/envoyproxy/go-control-plane/envoy/config/listener/v3"
	manager "github.com/envoyproxy/go-control-plane/envoy/extensions/filters/network/http_connection_manager/v3"
	discovery "github.com/envoyproxy/go-control-plane/envoy/service/discovery/v3"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/protobuf/encoding/protojson"
	"google.golang.org/protobuf/encoding/protowire"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/reflect/protoreflect"
	"google.golang.org/protobuf/reflect/protoregistry"
	"google.golang.org/protobuf/types/known/anypb"
	"google.golang.org/protobuf/types/known/structpb"
)

// dump is a proxy without a proxy: it subscribes to everything as Envoy does, accepts it, and writes it as JSON, one file for each
// type, and types.json with every message type and the fields set in it.
func dump(args []string) error {
	set := flag.NewFlagSet("dump", flag.ExitOnError)
	address := set.String("address", "", "HOST:PORT or unix:PATH of the control plane")
	nodeFile := set.String("node", "", "file with the node as JSON")
	out := set.String("out", "", "folder for what came")
	delta := set.Bool("delta", false, "use the delta protocol")
	secure := set.Bool("tls", false, "TLS without verification")
	quiet := set.Duration("quiet", 2*time.Second, "end after so long without a response")
	_ = set.Parse(args)
	text, err := os.ReadFile(*nodeFile)
	if err != nil {
		return err
	}
	node := &core.Node{}
	if err := protojson.Unmarshal(text, node); err != nil {
		return err
	}
	creds := insecure.NewCredentials()
	if *secure {
		creds = credentials.NewTLS(&tls.Config{InsecureSkipVerify: true})
	}
	connection, err := grpc.NewClient(*address, grpc.WithTransportCredentials(creds),
		grpc.WithDefaultCallOptions(grpc.MaxCallRecvMsgSize(1<<30)))
	if err != nil {
		return err
	}
	d := &dumper{node: node, got: map[string]map[string]*anypb.Any{}, asked: map[string]map[string]bool{}}
	ctx, cancel := context.WithCancel(context.Background())
	defer cancel()
	client := discovery.NewAggregatedDiscoveryServiceClient(connection)
	run := d.sotw
	if *delta {
		run = d.delta
	}
	if err := run(ctx, client, *quiet); err != nil {
		return err
	}
	return d.write(*out)
}

type dumper struct {
	node  *core.Node
	got   map[string]map[string]*anypb.Any
	asked map[string]map[string]bool
}

// more are the names of a type that the resources at hand lead to and that were not asked for yet.
func (d *dumper) more() map[string][]string {
	found := map[string][]string{}
	ask := func(kind, name string) {
		url := shorts[kind]
		if name == "" || d.asked[url][name] {
			return
		}
		if d.asked[url] == nil {
			d.asked[url] = map[string]bool{}
		}
		d.asked[url][name] = true
		found[url] = append(found[url], name)
	}
	for _, kind := range []string{"cds", "lds"} {
		for _, packed := range d.got[shorts[kind]] {
			walk(packed, func(m proto.Message) {
				switch m := m.(type) {
				case *cluster.Cluster:
					if m.GetType() == cluster.Cluster_EDS {
						name := m.GetEdsClusterConfig().GetServiceName()
						if name == "" {
							name = m.Name
						}
						ask("eds", name)
					}
				case *manager.HttpConnectionManager:
					ask("rds", m.GetRds().GetRouteConfigName())
				case *manager.HttpFilter:
					if m.GetConfigDiscovery() != nil {
						ask("ecds", m.Name)
					}
				case *listener.Filter:
					if m.GetConfigDiscovery() != nil {
						ask("ecds", m.Name)
					}
				}
			}, nil)
		}
	}
	return found
}

func (d *dumper) keep(typeURL, name string, one *anypb.Any) {
	if d.got[typeURL] == nil {
		d.got[typeURL] = map[string]*anypb.Any{}
	}
	if name == "" {
		name = nameOf(one)
	}
	d.got[typeURL][name] = one
}

// nameOf is the first field called name or cluster_name.
func nameOf(packed *anypb.Any) string {
	message, err := packed.UnmarshalNew()
	if err != nil {
		return ""
	}
	for _, field := range []protoreflect.Name{"cluster_name", "name"} {
		if f := message.ProtoReflect().Descriptor().Fields().ByName(field); f != nil {
			return message.ProtoReflect().Get(f).String()
		}
	}
	return ""
}

var wildcard = []string{"cds", "lds"}

func (d *dumper) sotw(ctx context.Context, client discovery.AggregatedDiscoveryServiceClient, quiet time.Duration) error {
	stream, err := client.StreamAggregatedResources(ctx)
	if err != nil {
		return err
	}
	for _, kind := range wildcard {
		if err := stream.Send(&discovery.DiscoveryRequest{Node: d.node, TypeUrl: shorts[kind]}); err != nil {
			return err
		}
	}
	came := make(chan *discovery.DiscoveryResponse)
	go receive(came, stream.Recv)
	for {
		got, open, err := next(came, quiet)
		if !open {
			return err
		}
		for _, one := range got.Resources {
			d.keep(got.TypeUrl, "", one)
		}
		answer := &discovery.DiscoveryRequest{TypeUrl: got.TypeUrl, VersionInfo: got.VersionInfo, ResponseNonce: got.Nonce, ResourceNames: keys(d.asked[got.TypeUrl])}
		if err := stream.Send(answer); err != nil {
			return err
		}
		for url := range d.more() {
			if err := stream.Send(&discovery.DiscoveryRequest{TypeUrl: url, ResourceNames: keys(d.asked[url])}); err != nil {
				return err
			}
		}
	}
}

func (d *dumper) delta(ctx context.Context, client discovery.AggregatedDiscoveryServiceClient, quiet time.Duration) error {
	stream, err := client.DeltaAggregatedResources(ctx)
	if err != nil {
		return err
	}
	for _, kind := range wildcard {
		if err := stream.Send(&discovery.DeltaDiscoveryRequest{Node: d.node, TypeUrl: shorts[kind]}); err != nil {
			return err
		}
	}
	came := make(chan *discovery.DeltaDiscoveryResponse)
	go receive(came, stream.Recv)
	for {
		got, open, err := next(came, quiet)
		if !open {
			return err
		}
		for _, one := range got.Resources {
			d.keep(got.TypeUrl, one.Name, one.Resource)
		}
		for _, name := range got.RemovedResources {
			delete(d.got[got.TypeUrl], name)
		}
		if err := stream.Send(&discovery.DeltaDiscoveryRequest{TypeUrl: got.TypeUrl, ResponseNonce: got.Nonce}); err != nil {
			return err
		}
		for url, names := range d.more() {
			if err := stream.Send(&discovery.DeltaDiscoveryRequest{TypeUrl: url, ResourceNamesSubscribe: names}); err != nil {
				return err
			}
		}
	}
}

func receive[T any](into chan<- T, recv func() (T, error)) {
	defer close(into)
	for {
		one, err := recv()
		if err != nil {
			fmt.Fprintln(os.Stderr, "the stream ended:", err)
			return
		}
		into <- one
	}
}

// next is the next response; no error when none comes for so long.
func next[T any](came <-chan T, quiet time.Duration) (got T, open bool, err error) {
	select {
	case got, open = <-came:
		if !open {
			err = errors.New("the stream ended")
		}
		return got, open, err
	case <-time.After(quiet):
		return got, false, nil
	}
}

func keys(set map[string]bool) []string {
	var names []string
	for name := range set {
		names = append(names, name)
	}
	slices.Sort(names)
	return names
}

// counts is how often each field of each message type is set.
type counts map[string]*typeCount

type typeCount struct {
	Messages int            `json:"messages"`
	InAny    int            `json:"in_any"`
	Fields   map[string]int `json:"fields"`
}

func (d *dumper) write(out string) error {
	if err := os.MkdirAll(out, 0o755); err != nil {
		return err
	}
	all := counts{}
	for url, resources := range d.got {
		names := make([]string, 0, len(resources))
		for name := range resources {
			names = append(names, name)
		}
		sort.Strings(names)
		list := []json.RawMessage{}
		for _, name := range names {
			walk(resources[name], nil, all)
			readable(resources[name].ProtoReflect())
			text, err := protojson.MarshalOptions{UseProtoNames: true}.Marshal(resources[name])
			if err != nil {
				return fmt.Errorf("%s: %w", name, err)
			}
			list = append(list, text)
		}
		if err := writeJSON(filepath.Join(out, strings.ReplaceAll(short(url), "/", "_")+".json"), list); err != nil {
			return err
		}
		fmt.Printf("%s %d\n", short(url), len(list))
	}
	return writeJSON(filepath.Join(out, "types.json"), all)
}

func writeJSON(path string, value any) error {
	text, err := json.MarshalIndent(value, "", "  ")
	if err != nil {
		return err
	}
	return os.WriteFile(path, append(text, '\n'), 0o644)
}

// readable makes a message ready for JSON: what is packed in a type that this program does not know becomes a Struct with its
// fields by number.
func readable(m protoreflect.Message) {
	if packed, is := m.Interface().(*anypb.Any); is {
		inner, err := packed.UnmarshalNew()
		if err != nil {
			value, _ := structpb.NewStruct(map[string]any{"unknown_type": packed.TypeUrl, "fields": fields(packed.Value)})
			packed.TypeUrl = "type.googleapis.com/google.protobuf.Struct"
			packed.Value, _ = proto.Marshal(value)
			return
		}
		readable(inner.ProtoReflect())
		packed.Value, _ = proto.MarshalOptions{Deterministic: true}.Marshal(inner)
		return
	}
	each(m, func(_ protoreflect.FieldDescriptor, inner protoreflect.Message) { readable(inner) })
}

// fields reads a message without its descriptor. Bytes that could be a message are shown as one, unless they are printable.
func fields(bytes []byte) []any {
	list := []any{}
	for len(bytes) > 0 {
		number, kind, n := protowire.ConsumeTag(bytes)
		if n < 0 {
			return nil
		}
		bytes = bytes[n:]
		var value any
		switch kind {
		case protowire.VarintType:
			v, m := protowire.ConsumeVarint(bytes)
			value, n = float64(v), m
		case protowire.BytesType:
			v, m := protowire.ConsumeBytes(bytes)
			value, n = readableBytes(v), m
		default:
			n = protowire.ConsumeFieldValue(number, kind, bytes)
		}
		if n < 0 {
			return nil
		}
		bytes = bytes[n:]
		list = append(list, map[string]any{fmt.Sprint(number): value})
	}
	return list
}

func readableBytes(bytes []byte) any {
	text := string(bytes)
	if utf8.ValidString(text) && !strings.ContainsFunc(text, unicode.IsControl) {
		return text
	}
	if inner := fields(bytes); inner != nil {
		return inner
	}
	return fmt.Sprintf("%x", bytes)
}

// each calls with every message that a field holds, maps and lists too.
func each(m protoreflect.Message, do func(protoreflect.FieldDescriptor, protoreflect.Message)) {
	m.Range(func(f protoreflect.FieldDescriptor, v protoreflect.Value) bool {
		switch {
		case f.IsMap():
			if f.MapValue().Message() != nil {
				v.Map().Range(func(_ protoreflect.MapKey, v protoreflect.Value) bool { do(f, v.Message()); return true })
			}
		case f.Message() == nil:
		case f.IsList():
			for i := range v.List().Len() {
				do(f, v.List().Get(i).Message())
			}
		default:
			do(f, v.Message())
		}
		return true
	})
}

// walk visits every message in a packed one, through what is packed in it, and counts.
func walk(packed *anypb.Any, visit func(proto.Message), all counts) {
	inner, err := packed.UnmarshalNew()
	if err != nil {
		if errors.Is(err, protoregistry.NotFound) && all != nil {
			all.of("UNKNOWN "+packed.TypeUrl).InAny++
		}
		return
	}
	if all != nil {
		all.of(string(inner.ProtoReflect().Descriptor().FullName())).InAny++
	}
	walkMessage(inner.ProtoReflect(), visit, all)
}

func walkMessage(m protoreflect.Message, visit func(proto.Message), all counts) {
	if packed, is := m.Interface().(*anypb.Any); is {
		walk(packed, visit, all)
		return
	}
	if visit != nil {
		visit(m.Interface())
	}
	if m.Descriptor().ParentFile().Package() == "google.protobuf" {
		return
	}
	if all != nil {
		count := all.of(string(m.Descriptor().FullName()))
		count.Messages++
		m.Range(func(f protoreflect.FieldDescriptor, v protoreflect.Value) bool {
			name := string(f.Name())
			if f.Enum() != nil && !f.IsList() && !f.IsMap() {
				if value := f.Enum().Values().ByNumber(v.Enum()); value != nil {
					name += "=" + string(value.Name())
				}
			}
			if m.Descriptor().Name() == "TypedStruct" && name == "type_url" {
				name += "=" + v.String()
			}
			count.Fields[name]++
			return true
		})
	}
	each(m, func(_ protoreflect.FieldDescriptor, inner protoreflect.Message) { walkMessage(inner, visit, all) })
}

func (c counts) of(name string) *typeCount {
	if c[name] == nil {
		c[name] = &typeCount{Fields: map[string]int{}}
	}
	return c[name]
}
