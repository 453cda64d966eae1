package main

import (
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"net/http"
	"os"
	"slices"
	"strings"
	"time"

	dto "github.com/prometheus/client_model/go"
	"github.com/prometheus/common/expfmt"
	"github.com/prometheus/common/model"
	"github.com/spf13/cobra"
	"golang.org/x/sys/unix"

	"nftwl/pkg/config"
)

func newStatus(configPath *string) *cobra.Command {
	var asJSON bool
	cmd := &cobra.Command{
		Use:   "status",
		Short: "Show what the running nftwld has counted",
		Long: `Shows what the running nftwld has counted since it started, one line for each
metric. A successful login is added, renewed or unchanged: that is what happened
to the client's address in the trusted set. A failed login is counted, repeated
(the same user and password has failed before) or right (it has succeeded
before); only those that are counted lead to a ban.

Exit status: 0 when nftwld answers, 1 when it does not, 2 when the command line
was wrong.`,
		Args: cobra.NoArgs,
		RunE: func(*cobra.Command, []string) error {
			c, err := config.Load(*configPath)
			if err != nil {
				return failure{err, ""}
			}
			families, err := ask("http://" + listenAddress(c).String() + "/metrics")
			if errors.Is(err, unix.ECONNREFUSED) {
				return failure{err, "systemctl start nftwld"}
			}
			if err != nil {
				return failure{err, ""}
			}
			if asJSON {
				err = json.NewEncoder(os.Stdout).Encode(tree(families))
			} else {
				_, err = os.Stdout.WriteString(table(families))
			}
			if err != nil {
				return failure{err, ""}
			}
			return nil
		},
	}
	cmd.Flags().BoolVar(&asJSON, "json", false, "print one JSON object")
	return cmd
}

// ask returns nftwld's own metrics, without those of Go and the process.
func ask(url string) (map[string]*dto.MetricFamily, error) {
	client := http.Client{Timeout: 10 * time.Second}
	response, err := client.Get(url)
	if err != nil {
		return nil, err
	}
	defer response.Body.Close()
	if response.StatusCode != http.StatusOK {
		return nil, fmt.Errorf("%s: %s", url, response.Status)
	}
	parser := expfmt.NewTextParser(model.UTF8Validation)
	families, err := parser.TextToMetricFamilies(response.Body)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", url, err)
	}
	maps.DeleteFunc(families, func(name string, _ *dto.MetricFamily) bool { return !strings.HasPrefix(name, "nftwl_") })
	if len(families) == 0 {
		return nil, fmt.Errorf("%s has none of nftwld's metrics", url)
	}
	return families, nil
}

// short returns the name of a metric without the prefix and suffix.
func short(name string) string {
	return strings.TrimSuffix(strings.TrimPrefix(name, "nftwl_"), "_total")
}

func value(m *dto.Metric) float64 { return m.GetCounter().GetValue() + m.GetGauge().GetValue() }

// tree nests the values by their labels: {"trusted": {"added": 1}}.
func tree(families map[string]*dto.MetricFamily) map[string]any {
	root := make(map[string]any)
	for name, family := range families {
		for _, m := range family.Metric {
			at, key := root, short(name)
			for _, label := range m.Label {
				below, ok := at[key].(map[string]any)
				if !ok {
					below = make(map[string]any)
					at[key] = below
				}
				at, key = below, label.GetValue()
			}
			at[key] = value(m)
		}
	}
	return root
}

// table returns a line for each metric. It leaves out the values that are 0.
func table(families map[string]*dto.MetricFamily) string {
	var b strings.Builder
	for _, name := range slices.Sorted(maps.Keys(families)) {
		var parts []string
		for _, m := range families[name].Metric {
			var words []string
			for _, label := range m.Label {
				words = append(words, label.GetValue())
			}
			v := value(m)
			if v == 0 && len(words) > 0 {
				continue
			}
			text := fmt.Sprintf("%.0f", v)
			if strings.HasSuffix(name, "_timestamp_seconds") {
				text = "never"
				if v > 0 {
					text = time.Unix(int64(v), 0).Format(time.DateTime)
				}
			}
			parts = append(parts, strings.Join(append(words, text), " "))
		}
		if parts == nil {
			parts = []string{"0"}
		}
		label := strings.ReplaceAll(strings.TrimSuffix(short(name), "_timestamp_seconds"), "_", " ")
		fmt.Fprintf(&b, "%-20s %s\n", label, strings.Join(parts, ", "))
	}
	return b.String()
}
