// Makes one NVIDIA GPU two cards of unequal speed and memory for llama-server b10488, which can split a GPU into several devices
// by itself (GGML_CUDA_DEVICES), but only into equal ones:
//     g++ -O2 -std=c++17 -shared -fPIC -o cards.so cards.cpp -ldl
//     LD_PRELOAD=./cards.so CARDS=cards.txt llama-server …
// cards.txt has a line for each card: MiB that are free, and the card's speed as a part of the GPU's. It is read anew for each
// question about free memory, so it may change between loads. CUDA_VISIBLE_DEVICES names cards, as it names GPUs elsewhere.
//
// Memory: what ggml allocates on a card is counted in cards.txt.used, for all processes together, and refused above the limit.
// The CUDA context and its workspaces are not counted. Speed: behind the work that a card gets at once, its stream waits for so
// long that work and wait together take 1/speed of what the work took; nothing else waits, so devices overlap as ever.
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <sys/mman.h>
#include <time.h>
#include <unistd.h>

#include <atomic>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <map>
#include <mutex>
#include <string>

namespace {

constexpr int CARDS = 2;
constexpr int PROCESSES = 64;

struct Slot {  // of one process, in the file that all share
  std::atomic<int> pid;
  std::atomic<int64_t> used[CARDS];
};

int visible[CARDS] = {0, 1};  // this process's devices, by the number of the card
int visible_count = 0;        // 0: not a process of ggml's
Slot *slots = nullptr, *own = nullptr;

template <typename F> F real(const char *name, F) { return reinterpret_cast<F>(dlsym(RTLD_NEXT, name)); }
#define REAL(function) static const auto next = real(#function, &function)

bool dead(int pid) { return kill(pid, 0) != 0 && errno == ESRCH; }

struct Card {
  long free_mib;
  double speed;
};

Card card(int index) {
  Card found[CARDS] = {{1 << 30, 1.0}, {1 << 30, 1.0}};
  if (FILE *file = fopen(getenv("CARDS"), "r")) {
    for (Card &one : found)
      if (fscanf(file, "%ld %lf", &one.free_mib, &one.speed) != 2) break;
    fclose(file);
  }
  return found[index];
}

int card_of(const char *device) {  // "CUDA1" -> the card behind this process's second device; -1 for what is no such device
  if (!visible_count || !device || strncmp(device, "CUDA", 4) || device[4] < '0' || device[4] >= '0' + visible_count || device[5])
    return -1;
  return visible[device[4] - '0'];
}

int64_t limit(int index) { return static_cast<int64_t>(card(index).free_mib) << 20; }

int64_t used(int index) {
  int64_t sum = 0;
  for (Slot *slot = slots; slot < slots + PROCESSES; slot++) {
    const int pid = slot->pid;
    if (pid && !dead(pid)) sum += slot->used[index];
  }
  return sum;
}

void claim_slot() {
  const int file = open((std::string(getenv("CARDS")) + ".used").c_str(), O_RDWR | O_CREAT, 0600);
  if (file < 0 || ftruncate(file, sizeof(Slot) * PROCESSES)) abort();
  slots = static_cast<Slot *>(mmap(nullptr, sizeof(Slot) * PROCESSES, PROT_READ | PROT_WRITE, MAP_SHARED, file, 0));
  close(file);
  for (Slot *slot = slots; !own && slot < slots + PROCESSES; slot++) {
    int pid = slot->pid;
    if ((!pid || dead(pid)) && slot->pid.compare_exchange_strong(pid, getpid())) own = slot;
  }
  if (!own) abort();
  for (auto &bytes : own->used) bytes = 0;
}

__attribute__((constructor)) void begin() {
  if (!getenv("CARDS") || !dlsym(RTLD_NEXT, "ggml_backend_dev_memory")) return;
  const char *given = getenv("CUDA_VISIBLE_DEVICES");
  visible_count = 0;
  for (const char *at = given ? given : "0,1"; visible_count < CARDS && (*at == '0' || *at == '1'); at += at[1] == ',' ? 2 : 1)
    visible[visible_count++] = *at - '0';
  if (!visible_count) return;
  setenv("CUDA_VISIBLE_DEVICES", "0", 1);
  setenv("GGML_CUDA_DEVICES", visible_count == 1 ? "1" : "2", 1);
  claim_slot();
}

std::mutex lock;
std::map<void *, void *> stream_of;      // backend -> the stream in which it computes
thread_local void *computing = nullptr;  // the backend whose stream is sought

void seen(void *stream) {
  if (!computing || !stream) return;
  std::lock_guard<std::mutex> guard(lock);
  stream_of[computing] = stream;
  computing = nullptr;
}

struct Properties {  // how ggml_backend_dev_props begins
  const char *name, *description;
  size_t free_bytes, total_bytes;
};

struct Extent {  // dim3
  unsigned x, y, z;
};

struct Span {
  timespec begin;
  double speed;
};

double now_s(const timespec &time) { return time.tv_sec + time.tv_nsec * 1e-9; }

void mark(void *span) { clock_gettime(CLOCK_MONOTONIC, &static_cast<Span *>(span)->begin); }

void stretch(void *data) {
  Span *span = static_cast<Span *>(data);
  timespec time;
  clock_gettime(CLOCK_MONOTONIC, &time);
  const double begin = now_s(span->begin), end = begin + (now_s(time) - begin) / span->speed;
  while (now_s(time) < end) clock_gettime(CLOCK_MONOTONIC, &time);
  delete span;
}

}  // namespace

extern "C" {

const char *ggml_backend_dev_name(void *device);
const char *ggml_backend_buft_name(void *type);
const char *ggml_backend_name(void *backend);
void *ggml_backend_buffer_get_type(void *buffer);
size_t ggml_backend_buffer_get_size(void *buffer);
#pragma weak ggml_backend_dev_name
#pragma weak ggml_backend_buft_name
#pragma weak ggml_backend_name
#pragma weak ggml_backend_buffer_get_type
#pragma weak ggml_backend_buffer_get_size

void ggml_backend_dev_memory(void *device, size_t *free_bytes, size_t *total_bytes) {
  REAL(ggml_backend_dev_memory);
  next(device, free_bytes, total_bytes);
  const int index = card_of(ggml_backend_dev_name(device));
  if (index < 0) return;
  const int64_t left = limit(index) - used(index);
  *total_bytes = static_cast<size_t>(limit(index)) + (1 << 30);  // what the driver and the contexts take of a card
  *free_bytes = left > 0 ? static_cast<size_t>(left) : 0;
}

void ggml_backend_dev_get_props(void *device, Properties *properties) {
  REAL(ggml_backend_dev_get_props);
  next(device, properties);
  ggml_backend_dev_memory(device, &properties->free_bytes, &properties->total_bytes);
}

void *ggml_backend_buft_alloc_buffer(void *type, size_t size) {
  REAL(ggml_backend_buft_alloc_buffer);
  const int index = card_of(ggml_backend_buft_name(type));
  if (index >= 0 && used(index) + static_cast<int64_t>(size) > limit(index)) {
    fprintf(stderr, "cards: card %d is full: cudaMalloc failed: out of memory\n", index);
    return nullptr;
  }
  void *buffer = next(type, size);
  if (index >= 0 && buffer) own->used[index] += ggml_backend_buffer_get_size(buffer);
  return buffer;
}

void ggml_backend_buffer_free(void *buffer) {
  REAL(ggml_backend_buffer_free);
  const int index = buffer ? card_of(ggml_backend_buft_name(ggml_backend_buffer_get_type(buffer))) : -1;
  if (index >= 0) own->used[index] -= ggml_backend_buffer_get_size(buffer);
  next(buffer);
}

int cudaDeviceGetPCIBusId(char *text, int length, int device) {  // asked once for each device
  REAL(cudaDeviceGetPCIBusId);
  const int error = next(text, length, device);
  if (!error && visible_count == 1) snprintf(text + strlen(text), length - strlen(text), "-v%d", visible[0]);  // as ggml does for two
  static int said = 0;
  static const auto ask = reinterpret_cast<int (*)(int *, int, int)>(dlsym(RTLD_DEFAULT, "cudaDeviceGetAttribute"));
  int major = 0, minor = 0;
  if (said < visible_count && !ask(&major, 75, device) && !ask(&minor, 76, device))  // cudaDevAttrComputeCapabilityMajor, -Minor
    fprintf(stderr, "  Device %d: card %d, compute capability %d.%d\n", said, visible[said], major, minor);  // Ollama looks for it
  said++;
  return error;
}

int cudaGraphLaunch(void *graph, void *stream) {
  REAL(cudaGraphLaunch);
  seen(stream);
  return next(graph, stream);
}

int __cudaLaunchKernel(void *kernel, Extent grid, Extent block, void **arguments, size_t shared_bytes, void *stream) {
  REAL(__cudaLaunchKernel);
  seen(stream);
  return next(kernel, grid, block, arguments, shared_bytes, stream);
}

int ggml_backend_graph_compute_async(void *backend, void *graph) {
  REAL(ggml_backend_graph_compute_async);
  const int index = card_of(ggml_backend_name(backend));
  const double speed = index < 0 ? 1.0 : card(index).speed;
  if (speed >= 1.0) return next(backend, graph);
  void *stream = nullptr;
  {
    std::lock_guard<std::mutex> guard(lock);
    if (const auto found = stream_of.find(backend); found != stream_of.end()) stream = found->second;
  }
  if (!stream) {  // the first time tells which stream it is
    computing = backend;
    const int status = next(backend, graph);
    computing = nullptr;
    return status;
  }
  static const auto call = reinterpret_cast<int (*)(void *, void (*)(void *), void *)>(dlsym(RTLD_DEFAULT, "cudaLaunchHostFunc"));
  Span *span = new Span{{}, speed};
  call(stream, mark, span);
  const int status = next(backend, graph);
  call(stream, stretch, span);
  return status;
}
}
