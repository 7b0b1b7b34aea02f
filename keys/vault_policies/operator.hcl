# The operator moves epochs along without ever seeing a key: no encrypt, no decrypt, no secrets.
path "${prefix}/transit/keys/kek" { capabilities = ["read"] }
path "${prefix}/transit/keys/kek/rotate" { capabilities = ["update"] }
path "${prefix}/transit/keys/kek/trim" { capabilities = ["update"] }
path "${prefix}/transit/rewrap/kek" { capabilities = ["update"] }
# Only the minimum versions: the same path could make the key exportable or deletable.
path "${prefix}/transit/keys/kek/config" {
  capabilities = ["update"]
  allowed_parameters = {
    "min_decryption_version" = []
    "min_encryption_version" = []
  }
}
path "${prefix}/transit/keys/audit-log" { capabilities = ["read"] }
path "${prefix}/transit/keys/audit-log/rotate" { capabilities = ["update"] }
path "${prefix}/transit/keys/identity" { capabilities = ["read"] }
path "${prefix}/transit/keys/identity/rotate" { capabilities = ["update"] }
