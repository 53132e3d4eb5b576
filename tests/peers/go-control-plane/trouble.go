package main

import (
	"encoding/json"
	"fmt"
	"net/http"
	"slices"
	"time"

	discovery "github.com/envoyproxy/go-control-plane/envoy/service/discovery/v3"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/encoding"
	_ "google.golang.org/grpc/encoding/proto" // the codec that is wrapped
	"google.golang.org/grpc/mem"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/anypb"
	"google.golang.org/protobuf/types/known/durationpb"
)

// trouble is what goes wrong with each response from now on. It ends when the next trouble is set.
type trouble struct {
	Hang      bool     `json:"hang"`      // responses wait until this ends
	Close     bool     `json:"close"`     // the stream ends after a response
	Garbage   bool     `json:"garbage"`   // resources that cannot be read
	Malformed bool     `json:"malformed"` // a message that cannot be read
	Refuse    bool     `json:"refuse"`    // new streams are refused
	Repeat    bool     `json:"repeat"`    // what was refused is sent again, at once and without end
	DelayMS   int      `json:"delay_ms"`  // responses come late
	Types     []string `json:"types"`     // only these types; all when empty
}

func (t *trouble) covers(typeURL string) bool {
	return len(t.Types) == 0 || slices.Contains(t.Types, short(typeURL))
}

func (r *record) setTrouble(t trouble) error {
	for _, name := range t.Types {
		if shorts[name] == "" {
			return fmt.Errorf("no type is called %s", name)
		}
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	r.trouble = t
	close(r.changed)
	r.changed = make(chan struct{})
	return nil
}

func (r *record) refused() error {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.trouble.Refuse {
		return status.Error(codes.Unavailable, "refused as told")
	}
	return nil
}

func (r *record) hangs(typeURL string) bool {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.trouble.Hang && r.trouble.covers(typeURL)
}

// calm waits until the type's responses may go out, or done closes; the trouble that holds then.
func (r *record) calm(typeURL string, done <-chan struct{}) (trouble, bool) {
	for {
		r.mu.Lock()
		now, changed := r.trouble, r.changed
		r.mu.Unlock()
		if !now.covers(typeURL) {
			return trouble{}, true
		}
		if !now.Hang {
			if now.DelayMS > 0 {
				select {
				case <-time.After(time.Duration(now.DelayMS) * time.Millisecond):
				case <-done:
					return now, false
				}
			}
			return now, true
		}
		select {
		case <-changed:
		case <-done:
			return now, false
		}
	}
}

// suffer applies the trouble to a response: what goes out instead, and whether the stream ends after it.
func (t *tap) suffer(m any, typeURL string) (any, bool, error) {
	now, alive := t.record.calm(typeURL, t.ctx.Done())
	if !alive {
		return m, false, t.ctx.Err()
	}
	if now.Malformed {
		return raw(nonsense), now.Close, nil
	}
	if now.Garbage {
		switch whole := m.(type) {
		case *discovery.DiscoveryResponse:
			bad := proto.Clone(whole).(*discovery.DiscoveryResponse)
			for _, one := range bad.Resources {
				one.Value = nonsense
			}
			m = bad
		case *discovery.DeltaDiscoveryResponse:
			bad := proto.Clone(whole).(*discovery.DeltaDiscoveryResponse)
			for _, one := range bad.Resources {
				one.Resource.Value = nonsense
			}
			m = bad
		}
	}
	return m, now.Close, nil
}

// sufferRest applies the trouble to a poll; false when the answer is given already.
func (r *record) sufferRest(w http.ResponseWriter, req *http.Request, typeURL string) bool {
	now, alive := r.calm(typeURL, req.Context().Done())
	switch {
	case !alive:
		return false
	case now.Refuse:
		http.Error(w, "refused as told", http.StatusServiceUnavailable)
		return false
	case now.Malformed || now.Garbage:
		_, _ = w.Write(nonsense)
		return false
	}
	if now.Close {
		w.Header().Set("connection", "close")
	}
	return true
}

func (r *record) closeAll() {
	r.mu.Lock()
	defer r.mu.Unlock()
	for t := range r.streams {
		t.cancel()
	}
}

// unasked is a response that the caches would not send.
type unasked struct {
	Type      string            `json:"type"`
	Version   string            `json:"version"`
	Nonce     string            `json:"nonce"`
	Resources []json.RawMessage `json:"resources"`
	Removed   []string          `json:"removed"`  // delta
	Versions  []string          `json:"versions"` // delta: of the resources, by place
	Names     []string          `json:"names"`    // delta: of the resources, by place
	TTLs      []string          `json:"ttls"`     // delta: of the resources, by place
	Aliases   [][]string        `json:"aliases"`  // delta: of the resources, by place; a resource that is null is only these
	TypeURL   string            `json:"type_url"` // instead of that of `type`
}

func (r *record) send(u unasked) error {
	typeURL := u.TypeURL
	if typeURL == "" {
		typeURL = shorts[u.Type]
	}
	var packed []*anypb.Any
	for _, text := range u.Resources {
		if string(text) == "null" {
			packed = append(packed, nil)
			continue
		}
		_, one, err := parse(text)
		if err != nil {
			return err
		}
		any, err := anypb.New(one.Resource)
		if err != nil {
			return err
		}
		packed = append(packed, any)
	}
	sotw := &discovery.DiscoveryResponse{VersionInfo: u.Version, Nonce: u.Nonce, TypeUrl: typeURL, Resources: packed}
	delta := &discovery.DeltaDiscoveryResponse{
		SystemVersionInfo: u.Version, Nonce: u.Nonce, TypeUrl: typeURL, RemovedResources: u.Removed,
	}
	at := func(list []string, place int) string {
		if place < len(list) {
			return list[place]
		}
		return ""
	}
	for place, any := range packed {
		one := &discovery.Resource{Name: at(u.Names, place), Version: at(u.Versions, place), Resource: any}
		if text := at(u.TTLs, place); text != "" {
			ttl, err := time.ParseDuration(text)
			if err != nil {
				return err
			}
			one.Ttl = durationpb.New(ttl)
		}
		if place < len(u.Aliases) {
			one.Aliases = u.Aliases[place]
		}
		delta.Resources = append(delta.Resources, one)
	}
	r.mu.Lock()
	open := make([]*tap, 0, len(r.streams))
	for t := range r.streams {
		open = append(open, t)
	}
	r.mu.Unlock()
	for _, t := range open {
		var err error
		if t.delta {
			err = t.pass(delta)
		} else {
			err = t.pass(sotw)
		}
		if err != nil {
			return err
		}
	}
	return nil
}

// nonsense is no protobuf message: a field of a wire type that does not exist.
var nonsense = []byte{0xff, 0xff, 0xff, 0xff, 0x07}

// raw is a message that goes out as it is.
type raw []byte

// rawCodec is gRPC's own codec, except for raw messages.
type rawCodec struct{}

func (rawCodec) Name() string { return "proto" }

func (rawCodec) Marshal(v any) (mem.BufferSlice, error) {
	if bytes, is := v.(raw); is {
		return mem.BufferSlice{mem.SliceBuffer(bytes)}, nil
	}
	return encoding.GetCodecV2("proto").Marshal(v)
}

func (rawCodec) Unmarshal(data mem.BufferSlice, v any) error {
	return encoding.GetCodecV2("proto").Unmarshal(data, v)
}
