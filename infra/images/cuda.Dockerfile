# Workers with NVIDIA GPUs. From the repository's root:
#   docker build -f infra/images/cuda.Dockerfile -t REGISTRY/millijoule:0.1.0-cuda .
# PyTorch's wheels bring CUDA's libraries; the driver's come from the host (NVIDIA's container runtime, GKE's device plugin).
# The base is pinned by its tag; `--build-arg BASE=python:3.11.14-slim-bookworm@sha256:...` pins its bytes, too: take the digest that
# your registry has of it.
ARG BASE=python:3.11.14-slim-bookworm

FROM ${BASE} AS build
SHELL ["/bin/bash", "-o", "pipefail", "-c"]
RUN apt-get update \
 && apt-get install -y --no-install-recommends g++=4:12.2.0-3 \
 && rm -rf /var/lib/apt/lists/*
ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1 DS_BUILD_OPS=0
RUN python -m venv /opt/millijoule
COPY infra/constraints/cpu.txt /tmp/cpu.txt
# the versions the tests ran with, but for Triton, whose version PyTorch for CUDA says itself
RUN sed '/^triton==/d' /tmp/cpu.txt > /constraints.txt \
 && /opt/millijoule/bin/pip install -c /constraints.txt torch \
 && /opt/millijoule/bin/python -c "import torch; assert torch.version.cuda, 'this PyTorch is for CPUs'"
COPY . /source
RUN /opt/millijoule/bin/pip install -c /constraints.txt "/source[diffusers,otel,report,verify]"
# the compiled kernels are optional for pip, not for this image
WORKDIR /
RUN /opt/millijoule/bin/python -c "from millijoule.kernels.native_library import forms_here; assert forms_here(), 'the C++ kernels were not built'" \
 && /opt/millijoule/bin/python /source/infra/images/triton_binding.py build /opt/millijoule/triton

# what the last stage has, listed by its own Python and dpkg
FROM ${BASE} AS inventory
COPY --from=build /opt/millijoule /opt/millijoule
COPY infra/images/sbom.py /sbom.py
RUN python /sbom.py --python /opt/millijoule --python /usr/local --dpkg-status /var/lib/dpkg/status \
    --name millijoule-cuda /millijoule.cdx.json

FROM ${BASE}
ARG BASE
LABEL org.opencontainers.image.base.name=${BASE} org.opencontainers.image.licenses=Apache-2.0
RUN groupadd --gid 1000 millijoule \
 && useradd --uid 1000 --gid 1000 --create-home --home-dir /scratch --shell /usr/sbin/nologin millijoule
COPY --from=build /opt/millijoule /opt/millijoule
COPY --from=inventory /millijoule.cdx.json /usr/share/doc/millijoule/millijoule.cdx.json
COPY --chmod=0755 infra/images/millijoule-job /usr/local/bin/millijoule-job
COPY --chmod=0755 infra/images/triton_binding.py /usr/local/bin/triton-binding
# CC: what Triton calls for the one C file it has; LD_LIBRARY_PATH: where GKE puts the driver's libraries
ENV PATH=/opt/millijoule/bin:$PATH PYTHONUNBUFFERED=1 RAY_USAGE_STATS_ENABLED=0 \
    CC=/usr/local/bin/triton-binding MILLIJOULE_TRITON_BINDING=/opt/millijoule/triton \
    NVIDIA_VISIBLE_DEVICES=all NVIDIA_DRIVER_CAPABILITIES=compute,utility \
    LD_LIBRARY_PATH=/usr/local/nvidia/lib:/usr/local/nvidia/lib64
USER 1000:1000
WORKDIR /scratch
CMD ["millijoule", "--help"]
