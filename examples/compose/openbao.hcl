# OpenBao for docker-compose.yml: one node, which unseals itself with the key in its volume.
ui = false
api_addr = "https://openbao:8200"
cluster_addr = "https://127.0.0.1:8201"
log_level = "warn"

storage "raft" {
  path = "/openbao"
  node_id = "compose"
  performance_multiplier = 1
}

listener "tcp" {
  address = "0.0.0.0:8200"
  cluster_address = "127.0.0.1:8201"
  tls_cert_file = "/tls/openbao.pem"
  tls_key_file = "/tls/openbao.key"
  tls_min_version = "tls13"
}

seal "static" {
  current_key_id = "1"
  current_key = "file:///unseal/key"
}

audit "file" "havengate" {
  options {
    file_path = "/openbao/audit.log"
    mode = "0600"
  }
}
