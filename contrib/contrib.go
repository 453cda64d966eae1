// Package contrib has the files that other programs load: Dovecot, nft, systemd and
// fail2ban.
package contrib

import "embed"

// Files has the files that `nftwl setup` installs.
//
//go:embed dovecot/*.conf fail2ban/*/*.conf nftables/*.nft nftables/nftables.conf
//go:embed systemd/nftwl*.service systemd/nftwl*.timer systemd/nftwl*.socket systemd/nftwl-.service.d/*.conf
//go:embed systemd/standalone/*.service
var Files embed.FS
