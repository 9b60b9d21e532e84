# docker build -f docker/cpu.Dockerfile -t tradespace . ; docker run --rm -m 2g -v tradespace:/cache tradespace run smollm2-135m --memory 900MiB "Why is the sky blue?"
FROM python:3.12-slim
# the CPU kernels are compiled on first use
RUN apt-get update && apt-get install -y --no-install-recommends g++ && rm -rf /var/lib/apt/lists/*
WORKDIR /app
COPY pyproject.toml README.md LICENSE ./
COPY src src
# build with --build-arg TORCH_INDEX=… to take torch from an index that has CPU builds
ARG TORCH_INDEX=
RUN if [ -n "$TORCH_INDEX" ]; then pip install --no-cache-dir --index-url "$TORCH_INDEX" "torch>=2.11,<=2.13.0"; fi && pip install --no-cache-dir ".[engine,serve]"
ENV TRADESPACE_HOME=/cache HF_HOME=/cache/huggingface
# whose the folder is must be settled before it becomes a volume: a new volume starts as a copy of it, and what is changed later may be lost
RUN useradd --create-home tradespace && mkdir -p /cache && chown tradespace /cache
VOLUME /cache
USER tradespace
ENTRYPOINT ["tradespace"]
CMD ["--help"]
