package main

import (
	"context"
	"encoding/json"
	"fmt"
	"io"
	"net/http"
	"os"
	"path/filepath"
	"slices"
	"sync"
	"time"

	core "github.com/envoyproxy/go-control-plane/envoy/config/core/v3"
	lrs "github.com/envoyproxy/go-control-plane/envoy/service/load_stats/v3"
	"github.com/envoyproxy/go-control-plane/pkg/cache/types"
	"github.com/envoyproxy/go-control-plane/pkg/cache/v3"
	"github.com/envoyproxy/go-control-plane/pkg/resource/v3"
	"google.golang.org/protobuf/encoding/protojson"
	"google.golang.org/protobuf/types/known/anypb"
	"sigs.k8s.io/yaml"
)

// shorts are the names by which tests call the types.
var shorts = map[string]string{
	"cds": resource.ClusterType, "eds": resource.EndpointType, "lds": resource.ListenerType, "rds": resource.RouteType,
	"srds": resource.ScopedRouteType, "vhds": resource.VirtualHostType, "sds": resource.SecretType,
	"rtds": resource.RuntimeType, "ecds": resource.ExtensionConfigType,
}

func short(typeURL string) string {
	for name, url := range shorts {
		if url == typeURL {
			return name
		}
	}
	return typeURL
}

// everybody is the one group of nodes: all proxies get the same.
const everybody = "all"

type anyNode struct{}

func (anyNode) ID(*core.Node) string { return everybody }

// state is what is served.
type state struct {
	snapshots cache.SnapshotCache
	endpoints *cache.LinearCache // nil unless they have a cache of their own
	record    *record
	loads     *loads

	mu     sync.Mutex
	folder string
	served map[string]bool // the types of which there ever was a resource
}

func newState(ctx context.Context, f flags) *state {
	s := &state{record: newRecord(), folder: f.resources, served: map[string]bool{}}
	s.loads = newLoads(s.record)
	if f.heartbeat > 0 {
		s.snapshots = cache.NewSnapshotCacheWithHeartbeating(ctx, f.ads, anyNode{}, nil, f.heartbeat)
	} else {
		s.snapshots = cache.NewSnapshotCache(f.ads, anyNode{}, nil)
	}
	if f.mux {
		s.endpoints = cache.NewLinearCache(resource.EndpointType)
	}
	return s
}

func (s *state) cache() cache.Cache {
	if s.endpoints == nil {
		return s.snapshots
	}
	return &cache.MuxCache{
		Classify:      func(r *cache.Request) string { return r.GetTypeUrl() },
		ClassifyDelta: func(r *cache.DeltaRequest) string { return r.GetTypeUrl() },
		Caches:        s.muxed(),
	}
}

func (s *state) muxed() map[string]cache.Cache {
	all := map[string]cache.Cache{}
	for _, url := range shorts {
		all[url] = s.snapshots
	}
	all[resource.EndpointType] = s.endpoints
	return all
}

// written is a snapshot as tests write it. A resource is a message with @type, or {resource: …, ttl: 1s}.
type written struct {
	Version   string            `json:"version"`
	Versions  map[string]string `json:"versions"`
	Resources []json.RawMessage `json:"resources"`
}

func (s *state) put(w written) error {
	all := map[string][]types.ResourceWithTTL{}
	for at, text := range w.Resources {
		url, one, err := parse(text)
		if err != nil {
			return fmt.Errorf("resource %d: %w", at, err)
		}
		all[url] = append(all[url], one)
	}
	snapshot, err := cache.NewSnapshotWithTTLs(w.Version, all)
	if err != nil {
		return err
	}
	// A type that has become empty has a version too: the proxy is told that nothing is left.
	for url := range s.served {
		snapshot.Resources[cache.GetResponseType(url)].Version = w.Version
	}
	for url := range all {
		s.served[url] = true
	}
	for name, version := range w.Versions {
		at := cache.GetResponseType(shorts[name])
		if at == types.UnknownType {
			return fmt.Errorf("no type is called %s", name)
		}
		snapshot.Resources[at].Version = version
	}
	if s.endpoints != nil {
		own := map[string]types.Resource{}
		for _, one := range all[resource.EndpointType] {
			own[cache.GetResourceName(one.Resource)] = one.Resource
		}
		s.endpoints.SetResources(own)
	}
	return s.snapshots.SetSnapshot(context.Background(), everybody, snapshot)
}

func parse(text json.RawMessage) (string, types.ResourceWithTTL, error) {
	var one types.ResourceWithTTL
	var wrapped struct {
		Resource json.RawMessage `json:"resource"`
		TTL      string          `json:"ttl"`
	}
	if err := json.Unmarshal(text, &wrapped); err == nil && wrapped.Resource != nil {
		text = wrapped.Resource
		if wrapped.TTL != "" {
			ttl, err := time.ParseDuration(wrapped.TTL)
			if err != nil {
				return "", one, err
			}
			one.TTL = &ttl
		}
	}
	packed := &anypb.Any{}
	if err := protojson.Unmarshal(text, packed); err != nil {
		return "", one, err
	}
	message, err := packed.UnmarshalNew()
	one.Resource = message
	return packed.TypeUrl, one, err
}

// load makes one snapshot of all files in a folder: each holds {version, resources}, a list of resources, or one resource.
func (s *state) load(folder string) error {
	files, err := filepath.Glob(filepath.Join(folder, "*.[yj][as]*"))
	if err != nil {
		return err
	}
	slices.Sort(files)
	whole := written{Version: "1"}
	for _, file := range files {
		text, err := os.ReadFile(file)
		if err != nil {
			return err
		}
		if err := whole.add(text); err != nil {
			return fmt.Errorf("%s: %w", file, err)
		}
	}
	return s.put(whole)
}

func (w *written) add(text []byte) error {
	text, err := yaml.YAMLToJSON(text)
	if err != nil {
		return err
	}
	var list []json.RawMessage
	if json.Unmarshal(text, &list) == nil {
		w.Resources = append(w.Resources, list...)
		return nil
	}
	var kind struct {
		Type string `json:"@type"`
	}
	if err := json.Unmarshal(text, &kind); err != nil {
		return err
	}
	if kind.Type != "" {
		w.Resources = append(w.Resources, text)
		return nil
	}
	var more written
	if err := json.Unmarshal(text, &more); err != nil {
		return err
	}
	if more.Version != "" {
		w.Version = more.Version
	}
	w.Resources = append(w.Resources, more.Resources...)
	return nil
}

// control is the control port.
func (s *state) control() http.Handler {
	mux := http.NewServeMux()
	body := func(r *http.Request, into any) error {
		text, err := io.ReadAll(r.Body)
		if err != nil {
			return err
		}
		return yaml.UnmarshalStrict(text, into)
	}
	handle := func(pattern string, do func(*http.Request) error) {
		mux.HandleFunc(pattern, func(w http.ResponseWriter, r *http.Request) {
			s.mu.Lock()
			defer s.mu.Unlock()
			if err := do(r); err != nil {
				http.Error(w, err.Error(), http.StatusBadRequest)
			}
		})
	}
	handle("PUT /snapshot", func(r *http.Request) error {
		var w written
		if err := body(r, &w); err != nil {
			return err
		}
		return s.put(w)
	})
	handle("POST /reload", func(*http.Request) error { return s.load(s.folder) })
	handle("PUT /trouble", func(r *http.Request) error {
		var t trouble
		if err := body(r, &t); err != nil {
			return err
		}
		return s.record.setTrouble(t)
	})
	handle("POST /send", func(r *http.Request) error {
		var u unasked
		if err := body(r, &u); err != nil {
			return err
		}
		return s.record.send(u)
	})
	handle("PUT /load_stats", func(r *http.Request) error {
		text, err := io.ReadAll(r.Body)
		if err != nil {
			return err
		}
		answer := &lrs.LoadStatsResponse{}
		if err := protojson.Unmarshal(text, answer); err != nil {
			return err
		}
		s.loads.tell(answer)
		return nil
	})
	handle("POST /close", func(*http.Request) error { s.record.closeAll(); return nil })
	mux.HandleFunc("GET /log", func(w http.ResponseWriter, _ *http.Request) {
		w.Header().Set("content-type", "application/json")
		_ = json.NewEncoder(w).Encode(s.record.seen(s.loads))
	})
	return mux
}
