# The gateway wraps and unwraps data keys, signs what it says about identities, keeps the seeds of second
# factors, and hands in both halves of a pseudonym without being able to open either.
path "${prefix}/transit/encrypt/kek" { capabilities = ["update"] }
path "${prefix}/transit/decrypt/kek" { capabilities = ["update"] }
path "${prefix}/transit/keys/kek" { capabilities = ["read"] }
path "${prefix}/transit/hmac/hmac/sha2-256" { capabilities = ["update"] }
path "${prefix}/transit/encrypt/reid-first" { capabilities = ["update"] }
path "${prefix}/transit/encrypt/reid-second" { capabilities = ["update"] }
path "${prefix}/transit/sign/identity" { capabilities = ["update"] }
path "${prefix}/transit/keys/identity" { capabilities = ["read"] }
path "${prefix}/transit/keys/audit-log" { capabilities = ["read"] }
path "${prefix}/kv/data/gateway/*" { capabilities = ["create", "read", "update"] }
path "${prefix}/kv/metadata/gateway/*" { capabilities = ["read", "list", "delete"] }
path "${prefix}/pki/sign/server" { capabilities = ["update"] }
# The way out: certificates for the hosts that apps may call, from an authority that only apps trust.
path "${prefix}/outbound-pki/sign/outbound" { capabilities = ["update"] }
path "${prefix}/outbound-pki/cert/ca" { capabilities = ["read"] }
