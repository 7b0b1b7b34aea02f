# The writer of the audit log signs checkpoints and reads the public keys; nothing else.
path "${prefix}/transit/sign/audit-log" { capabilities = ["update"] }
path "${prefix}/transit/keys/audit-log" { capabilities = ["read"] }
