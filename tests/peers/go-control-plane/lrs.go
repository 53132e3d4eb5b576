package main

import (
	"fmt"
	"slices"
	"sync"

	core "github.com/envoyproxy/go-control-plane/envoy/config/core/v3"
	endpoint "github.com/envoyproxy/go-control-plane/envoy/config/endpoint/v3"
	lrs "github.com/envoyproxy/go-control-plane/envoy/service/load_stats/v3"
)

// loads is a load reporting service. It sums up what it is told, because which request falls into which report is chance.
type loads struct {
	lrs.UnimplementedLoadReportingServiceServer
	record *record

	mu      sync.Mutex
	answer  *lrs.LoadStatsResponse
	changed chan struct{} // closed when the answer changes
	sum     map[string]*clusterLoad
}

type clusterLoad struct {
	Service    string                   `json:"service,omitempty"`
	Reports    int                      `json:"reports"`
	Timed      int                      `json:"timed"` // those that say which time they cover
	Dropped    uint64                   `json:"dropped"`
	Categories map[string]uint64        `json:"categories,omitempty"`
	Localities map[string]*localityLoad `json:"localities"`
}

type localityLoad struct {
	load
	Endpoints map[string]*load `json:"endpoints,omitempty"`
}

type load struct {
	Successful uint64             `json:"successful"`
	Errors     uint64             `json:"errors"`
	Issued     uint64             `json:"issued"`
	Busiest    uint64             `json:"busiest"` // most requests in progress
	Metrics    map[string]*metric `json:"metrics,omitempty"`
}

type metric struct {
	Requests uint64  `json:"requests"`
	Total    float64 `json:"total"`
}

func newLoads(r *record) *loads {
	return &loads{record: r, changed: make(chan struct{}), sum: map[string]*clusterLoad{}}
}

// tell sets what every stream is answered, now and from now on.
func (l *loads) tell(answer *lrs.LoadStatsResponse) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.answer = answer
	close(l.changed)
	l.changed = make(chan struct{})
}

func (l *loads) StreamLoadStats(stream lrs.LoadReportingService_StreamLoadStatsServer) error {
	first, err := stream.Recv()
	if err != nil {
		return err
	}
	l.record.mu.Lock()
	features := slices.DeleteFunc(first.Node.GetClientFeatures(), func(f string) bool { return f != "envoy.lrs.supports_send_all_clusters" })
	l.record.add("lrs", request{Node: first.Node.GetId(), Names: features})
	l.record.mu.Unlock()
	l.add(first)
	ended := make(chan error, 1)
	go func() {
		for {
			report, err := stream.Recv()
			if err != nil {
				ended <- err
				return
			}
			l.add(report)
		}
	}()
	for {
		l.mu.Lock()
		answer, changed := l.answer, l.changed
		l.mu.Unlock()
		if answer != nil {
			if err := stream.Send(answer); err != nil {
				return err
			}
		}
		select {
		case <-changed:
		case err := <-ended:
			return err
		case <-stream.Context().Done():
			return nil
		}
	}
}

func (l *loads) add(report *lrs.LoadStatsRequest) {
	l.mu.Lock()
	defer l.mu.Unlock()
	for _, one := range report.ClusterStats {
		sum := l.sum[one.ClusterName]
		if sum == nil {
			sum = &clusterLoad{Localities: map[string]*localityLoad{}}
			l.sum[one.ClusterName] = sum
		}
		sum.Service = one.ClusterServiceName
		sum.Reports++
		if one.LoadReportInterval.AsDuration() > 0 {
			sum.Timed++
		}
		sum.Dropped += one.TotalDroppedRequests
		for _, drop := range one.DroppedRequests {
			if sum.Categories == nil {
				sum.Categories = map[string]uint64{}
			}
			sum.Categories[drop.Category] += drop.DroppedCount
		}
		for _, locality := range one.UpstreamLocalityStats {
			sum.locality(locality)
		}
	}
}

func (c *clusterLoad) locality(one *endpoint.UpstreamLocalityStats) {
	of := one.Locality
	name := fmt.Sprintf("%s/%s/%s %d", of.GetRegion(), of.GetZone(), of.GetSubZone(), one.Priority)
	sum := c.Localities[name]
	if sum == nil {
		sum = &localityLoad{}
		c.Localities[name] = sum
	}
	sum.add(one.TotalSuccessfulRequests, one.TotalErrorRequests, one.TotalIssuedRequests, one.TotalRequestsInProgress, one.LoadMetricStats)
	for _, host := range one.UpstreamEndpointStats {
		if sum.Endpoints == nil {
			sum.Endpoints = map[string]*load{}
		}
		at := address(host.Address)
		if sum.Endpoints[at] == nil {
			sum.Endpoints[at] = &load{}
		}
		sum.Endpoints[at].add(host.TotalSuccessfulRequests, host.TotalErrorRequests, host.TotalIssuedRequests, host.TotalRequestsInProgress, host.LoadMetricStats)
	}
}

func (l *load) add(successful, errors, issued, busy uint64, metrics []*endpoint.EndpointLoadMetricStats) {
	l.Successful += successful
	l.Errors += errors
	l.Issued += issued
	l.Busiest = max(l.Busiest, busy)
	for _, one := range metrics {
		if l.Metrics == nil {
			l.Metrics = map[string]*metric{}
		}
		if l.Metrics[one.MetricName] == nil {
			l.Metrics[one.MetricName] = &metric{}
		}
		l.Metrics[one.MetricName].Requests += one.NumRequestsFinishedWithMetric
		l.Metrics[one.MetricName].Total += one.TotalMetricValue
	}
}

func address(of *core.Address) string {
	if pipe := of.GetPipe(); pipe != nil {
		return pipe.Path
	}
	socket := of.GetSocketAddress()
	return fmt.Sprintf("%s:%d", socket.GetAddress(), socket.GetPortValue())
}
