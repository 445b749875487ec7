# The image of launch_configs/k8s, from requirements.lock alone:
#   docker build -t registry.example.com/lgp_dist:0.1.0 .
#   docker build --target test .        also runs the quick start with few steps in it
#   docker run --rm --gpus all --shm-size 8g registry.example.com/lgp_dist:0.1.0 lgp doctor --data shards/sample
# CUDA comes with torch's own packages; the base only lets the host's driver in. DeepSpeed and Triton compile with g++.
FROM nvidia/cuda:13.2.0-base-ubuntu24.04 AS image
RUN apt-get update \
    && apt-get install -y --no-install-recommends python3 python3-venv python3-dev g++ \
    && rm -rf /var/lib/apt/lists/* \
    && useradd --create-home --uid 10001 lgp \
    && install -d -o lgp -g lgp /opt/lgp
WORKDIR /opt/lgp
USER lgp
# What the environment is made from comes first: a change of the code alone does not install it again.
COPY --chown=lgp pyproject.toml requirements.lock README.md LICENSE ./
COPY --chown=lgp lgp_dist/__init__.py lgp_dist/
COPY --chown=lgp scripts/environment.sh scripts/
RUN bash -c '. scripts/environment.sh && lgp_environment' && rm -rf ~/.cache/pip
COPY --chown=lgp lgp_dist lgp_dist
COPY --chown=lgp scripts scripts
COPY --chown=lgp launch_configs launch_configs
COPY --chown=lgp shards/sample shards/sample
ENV PATH=/opt/lgp/.venv/bin:$PATH

FROM image AS test
RUN scripts/quickstart --run-dir /tmp/run --distil.train.max-steps 2 --finetune.train.max-steps 2 \
    && lgp report /tmp/run --out /tmp/report

FROM image
