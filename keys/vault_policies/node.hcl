# A Flower node has its certificate renewed.
path "${prefix}/pki/sign/node" { capabilities = ["update"] }
