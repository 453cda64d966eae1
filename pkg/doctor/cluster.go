package doctor

import (
	"context"
	"strconv"
	"strings"
	"time"

	"nftwl/pkg/config"
	"nftwl/pkg/install"
)

// clusterFaults are what nftwld says of a server that it cannot use, by the word in
// its metric nftwl_cluster_down.
var clusterFaults = map[string]struct {
	text   string
	remedy remedy
}{
	"login":    {"refuses the user or the password", remedy{"correct the user in cluster.server or the password in cluster.password_file", "systemctl restart nftwld"}},
	"acl":      {"denies its user a command or a key that nftwld needs", remedy{words: "give the user the ACL of docs/cluster.md"}},
	"memory":   {"has no memory left", remedy{words: "raise its maxmemory"}},
	"readonly": {"is a replica, which takes nothing", remedy{words: "name the primary in cluster.server, or Sentinel (docs/cluster.md)"}},
	"tls":      {"has a certificate that is not trusted", remedy{words: "name the certificates that sign it as cluster.ca_file, and the server by the name in its certificate"}},
	"sandbox":  {"cannot be reached, because nftwld.service forbids the network", remedy{"install the drop-in of docs/cluster.md", install.OpenNetwork}},
	"timeout":  {"does not answer in time", remedy{"see what nftwld says", "journalctl -u nftwld"}},
	"network":  {"cannot be reached", remedy{"start it, and let nftwld.service reach it (docs/cluster.md)", "journalctl -u nftwld"}},
}

// checkCluster asks nftwld whether it shares the sets, if it should.
func (d *Doctor) checkCluster(ctx context.Context) {
	const check = "cluster"
	c := d.config.Cluster
	if c == nil {
		return
	}
	address := config.DefaultPolicy.Listen
	if d.config.Policy != nil {
		address = d.config.Policy.Listen
	}
	status, text, err := exchange(ctx, address.String(), "GET /metrics HTTP/1.0\r\n\r\n")
	metrics := make(map[string]float64)
	down := "engine"
	for line := range strings.Lines(text) {
		name, value, _ := strings.Cut(strings.TrimSpace(line), " ")
		metrics[name], _ = strconv.ParseFloat(value, 64) // a comment has none
		if after, ok := strings.CutPrefix(name, `nftwl_cluster_down{reason="`); ok && metrics[name] == 1 {
			down = strings.TrimSuffix(after, `"}`)
		}
	}
	connected, shares := metrics["nftwl_cluster_connected"]
	since := time.Unix(int64(metrics["nftwl_cluster_since_timestamp_seconds"]), 0)
	switch fault, known := clusterFaults[down]; {
	case err != nil:
		d.fail(check, remedy{"start it", "systemctl start nftwld"}, "nftwld does not run, so nothing is shared with other machines: %v", err)
	case status != 200 || !shares:
		d.fail(check, remedy{"have it read the configuration", "systemctl restart nftwld"}, "nftwld runs without the configured cluster")
	case connected == 1 && metrics["nftwl_cluster_evicts"] == 1:
		d.warn(check, remedy{words: "set its maxmemory-policy to noeviction"}, "%s throws away what machines share when its memory is full", c.Server)
	case connected == 1:
		d.ok(check, "%.0f trusted and %.0f banned addresses are shared with other machines",
			metrics[`nftwl_cluster_records{list="trusted"}`], metrics[`nftwl_cluster_records{list="banned"}`])
	case known:
		d.fail(check, fault.remedy, "nothing has been shared with other machines since %s: %s %s", since.Format(time.DateTime), c.Server, fault.text)
	default:
		d.fail(check, remedy{"see what nftwld says", "journalctl -u nftwld"}, "nothing has been shared with other machines since %s", since.Format(time.DateTime))
	}
}
