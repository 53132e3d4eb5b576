package main

import (
	"bytes"
	"context"
	"encoding/json"
	"io"
	"net/http"
	"slices"
	"sync"

	discovery "github.com/envoyproxy/go-control-plane/envoy/service/discovery/v3"
	xds "github.com/envoyproxy/go-control-plane/pkg/server/v3"
	failure "google.golang.org/genproto/googleapis/rpc/status"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/encoding/protojson"
)

// record holds what was received and sent. It stands between gRPC and the server, so that it sees messages as they are on the wire:
// the server itself fills in the node where a message has none.
//
// Nonces count over all types of a stream, in an order that timing decides. The record therefore turns the nonce of a request into
// `answers`: the how-manieth response of this type on this stream it belongs to.
//
// go-control-plane answers a refusal with what was refused, at once and without end: it compares the version of the request, which is
// the last good one, with that of its snapshot. The record therefore shows it an acceptance, unless the trouble is `repeat`.
type record struct {
	mu       sync.Mutex
	changed  chan struct{} // closed when the trouble changes
	trouble  trouble
	opened   int
	streams  map[*tap]struct{}
	requests map[string][]request
	sent     map[string][]response
}

type request struct {
	Stream      int               `json:"stream,omitempty"` // absent for REST
	Node        string            `json:"node,omitempty"`
	Version     string            `json:"version,omitempty"`
	Answers     any               `json:"answers,omitempty"`
	Names       []string          `json:"names,omitempty"`
	Error       string            `json:"error,omitempty"`
	Code        int32             `json:"code,omitempty"`
	Subscribe   []string          `json:"subscribe,omitempty"`
	Unsubscribe []string          `json:"unsubscribe,omitempty"`
	Initial     map[string]string `json:"initial,omitempty"`
}

type response struct {
	Stream  int      `json:"stream,omitempty"`
	Version string   `json:"version,omitempty"`
	Count   int      `json:"count"`
	Removed []string `json:"removed,omitempty"`
}

func newRecord() *record {
	return &record{
		changed: make(chan struct{}), streams: map[*tap]struct{}{},
		requests: map[string][]request{}, sent: map[string][]response{},
	}
}

func (r *record) seen(l *loads) any {
	r.mu.Lock()
	defer r.mu.Unlock()
	l.mu.Lock()
	defer l.mu.Unlock()
	// Encoded under the lock, because the lists grow.
	text, _ := json.Marshal(map[string]any{
		"opened": r.opened, "open": len(r.streams), "requests": r.requests, "responses": r.sent, "load": l.sum,
	})
	return json.RawMessage(text)
}

// tap is one stream.
type tap struct {
	grpc.ServerStream
	record *record
	ctx    context.Context
	cancel context.CancelFunc
	number int
	delta  bool
	sends  sync.Mutex     // one message at a time, also of those that nobody asked for
	nonces map[string]int // of each nonce, the place of its response among those of its type
	counts map[string]int
	// versions are those last sent, by type.
	versions map[string]string
}

func (r *record) intercept(srv any, stream grpc.ServerStream, _ *grpc.StreamServerInfo, handler grpc.StreamHandler) error {
	if err := r.refused(); err != nil {
		return err
	}
	ctx, cancel := context.WithCancel(stream.Context())
	defer cancel()
	t := &tap{
		ServerStream: stream, record: r, ctx: ctx, cancel: cancel,
		nonces: map[string]int{}, counts: map[string]int{}, versions: map[string]string{},
	}
	r.mu.Lock()
	r.opened++
	t.number = r.opened
	r.streams[t] = struct{}{}
	r.mu.Unlock()
	defer func() {
		r.mu.Lock()
		delete(r.streams, t)
		r.mu.Unlock()
	}()
	// The server does not look at its context, so that the stream ends here, with what is being sent.
	ended := make(chan error, 1)
	go func() { ended <- handler(srv, t) }()
	select {
	case err := <-ended:
		return err
	case <-ctx.Done():
		t.sends.Lock()
		defer t.sends.Unlock()
		return status.Error(codes.Unavailable, "ended as told")
	}
}

func (t *tap) Context() context.Context { return t.ctx }

func (t *tap) RecvMsg(m any) error {
	if err := t.ServerStream.RecvMsg(m); err != nil {
		return err
	}
	t.record.mu.Lock()
	defer t.record.mu.Unlock()
	switch m := m.(type) {
	case *discovery.DiscoveryRequest:
		one := request{Stream: t.number, Version: m.VersionInfo, Names: slices.Clone(m.ResourceNames), Node: m.Node.GetId()}
		one.answer(t, m.ResponseNonce, m.ErrorDetail)
		t.record.add(m.TypeUrl, one)
		if m.ErrorDetail != nil && !t.record.trouble.Repeat {
			m.VersionInfo, m.ErrorDetail = t.versions[m.TypeUrl], nil
		}
	case *discovery.DeltaDiscoveryRequest:
		t.delta = true
		one := request{
			Stream: t.number, Subscribe: slices.Clone(m.ResourceNamesSubscribe),
			Unsubscribe: slices.Clone(m.ResourceNamesUnsubscribe),
			Initial:     hashes(m.InitialResourceVersions), Node: m.Node.GetId(),
		}
		one.answer(t, m.ResponseNonce, m.ErrorDetail)
		t.record.add(m.TypeUrl, one)
	}
	return nil
}

// hashes puts a word in the place of versions that the server's caches made of the resources: they hold ports of the run.
func hashes(versions map[string]string) map[string]string {
	shown := map[string]string{}
	for name, version := range versions {
		if len(version) == 64 {
			version = "hash"
		}
		shown[name] = version
	}
	return shown
}

func (one *request) answer(t *tap, nonce string, why *failure.Status) {
	if place, known := t.nonces[nonce]; known {
		one.Answers = place
	} else if nonce != "" {
		one.Answers = "unknown nonce"
	}
	one.Error, one.Code = why.GetMessage(), why.GetCode()
}

// add notes a request. The order of names means nothing, and a proxy's may come from a hash.
func (r *record) add(typeURL string, one request) {
	for _, names := range [][]string{one.Names, one.Subscribe, one.Unsubscribe} {
		slices.Sort(names)
	}
	r.requests[short(typeURL)] = append(r.requests[short(typeURL)], one)
}

func (t *tap) SendMsg(m any) error {
	typeURL := ""
	switch m := m.(type) {
	case *discovery.DiscoveryResponse:
		typeURL = m.TypeUrl
	case *discovery.DeltaDiscoveryResponse:
		typeURL = m.TypeUrl
	}
	if t.record.hangs(typeURL) {
		// The server must not wait with it: other types go on.
		go func() { _ = t.late(m, typeURL) }()
		return nil
	}
	return t.late(m, typeURL)
}

// late sends a response when the trouble lets it go.
func (t *tap) late(m any, typeURL string) error {
	m, closes, err := t.suffer(m, typeURL)
	if err != nil {
		return err
	}
	if err := t.pass(m); err != nil {
		return err
	}
	if closes {
		t.cancel()
	}
	return nil
}

// pass sends a message and notes it.
func (t *tap) pass(m any) error {
	t.sends.Lock()
	defer t.sends.Unlock()
	if err := t.ctx.Err(); err != nil {
		return err
	}
	t.record.mu.Lock()
	switch m := m.(type) {
	case *discovery.DiscoveryResponse:
		t.note(m.TypeUrl, m.Nonce, response{Stream: t.number, Version: m.VersionInfo, Count: len(m.Resources)})
	case *discovery.DeltaDiscoveryResponse:
		t.note(m.TypeUrl, m.Nonce, response{
			Stream: t.number, Version: m.SystemVersionInfo, Count: len(m.Resources), Removed: m.RemovedResources,
		})
	}
	t.record.mu.Unlock()
	return t.ServerStream.SendMsg(m)
}

func (t *tap) note(typeURL, nonce string, one response) {
	t.counts[typeURL]++
	t.nonces[nonce] = t.counts[typeURL]
	t.versions[typeURL] = one.Version
	t.record.sent[short(typeURL)] = append(t.record.sent[short(typeURL)], one)
}

// rest serves polls, and records and troubles them too.
func (r *record) rest(server xds.Server) http.Handler {
	gateway := xds.HTTPGateway{Server: server}
	return http.HandlerFunc(func(w http.ResponseWriter, req *http.Request) {
		text, err := io.ReadAll(req.Body)
		if err != nil {
			http.Error(w, err.Error(), http.StatusBadRequest)
			return
		}
		req.Body = io.NopCloser(bytes.NewReader(text))
		typeURL := restTypes[req.URL.Path]
		var asked discovery.DiscoveryRequest
		if protojson.Unmarshal(text, &asked) == nil {
			r.mu.Lock()
			one := request{
				Version: asked.VersionInfo, Names: asked.ResourceNames, Node: asked.Node.GetId(),
				Error: asked.ErrorDetail.GetMessage(), Code: asked.ErrorDetail.GetCode(),
			}
			r.add(typeURL, one)
			r.mu.Unlock()
		}
		if !r.sufferRest(w, req, typeURL) {
			return
		}
		answer, code, err := gateway.ServeHTTP(req)
		if err != nil {
			http.Error(w, err.Error(), code)
			return
		}
		if code == http.StatusOK {
			w.Header().Set("content-type", "application/json")
		}
		w.WriteHeader(code)
		_, _ = w.Write(answer)
	})
}

var restTypes = map[string]string{
	"/v3/discovery:clusters": shorts["cds"], "/v3/discovery:endpoints": shorts["eds"],
	"/v3/discovery:listeners": shorts["lds"], "/v3/discovery:routes": shorts["rds"],
	"/v3/discovery:scoped-routes": shorts["srds"], "/v3/discovery:secrets": shorts["sds"],
	"/v3/discovery:runtime": shorts["rtds"], "/v3/discovery:extension_configs": shorts["ecds"],
}
