# An officer who opens the first half of a pseudonym. Nobody holds both halves.
path "${prefix}/transit/decrypt/reid-first" { capabilities = ["update"] }
