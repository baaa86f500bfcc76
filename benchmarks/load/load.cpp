// A load generator for any gRPC server: it sends the same message again and again and measures how long answers take.
//
//   load --target 127.0.0.1:50051 --method /cifar.v1.ImageClassifier/Classify --payload FILE --seconds 10
//        (--concurrency N | --rate R)  [--connections C] [--warmup S] [--deadline-ms D] [--seed S]
//
// With --concurrency the loop is closed: N calls are in flight, and the next one begins when one ends. With --rate it is
// open: calls begin at the times of a Poisson process, whether or not earlier ones have ended, and a latency is counted
// from that time, so that a queue in front of the server is not hidden. It is compiled and has one thread, because a
// client in Python would use more of the machine than the servers that it measures. It prints one JSON object.

#include <grpcpp/generic/generic_stub.h>
#include <grpcpp/grpcpp.h>
#include <sys/resource.h>

#include <algorithm>
#include <chrono>
#include <cstdio>
#include <fstream>
#include <iterator>
#include <map>
#include <memory>
#include <random>
#include <stdexcept>
#include <string>
#include <vector>

namespace {

using Clock = std::chrono::steady_clock;
using Seconds = std::chrono::duration<double>;

struct Options {
  std::string target, method, payload;
  double seconds = 10, warmup = 2, rate = 0, deadline_ms = 0;
  int concurrency = 0, connections = 1;
  unsigned seed = 0;
};

Options Parse(int count, char** arguments) {
  std::map<std::string, std::string> given;
  if (count % 2 == 0) throw std::runtime_error("options come in pairs: --name value");
  for (int i = 1; i < count; i += 2) given[arguments[i]] = arguments[i + 1];
  Options options;
  auto take = [&](const char* name, auto set) {
    if (auto found = given.find(name); found != given.end()) {
      set(found->second);
      given.erase(found);
    }
  };
  take("--target", [&](const std::string& value) { options.target = value; });
  take("--method", [&](const std::string& value) { options.method = value; });
  take("--payload", [&](const std::string& value) { options.payload = value; });
  take("--seconds", [&](const std::string& value) { options.seconds = std::stod(value); });
  take("--warmup", [&](const std::string& value) { options.warmup = std::stod(value); });
  take("--rate", [&](const std::string& value) { options.rate = std::stod(value); });
  take("--deadline-ms", [&](const std::string& value) { options.deadline_ms = std::stod(value); });
  take("--concurrency", [&](const std::string& value) { options.concurrency = std::stoi(value); });
  take("--connections", [&](const std::string& value) { options.connections = std::stoi(value); });
  take("--seed", [&](const std::string& value) { options.seed = static_cast<unsigned>(std::stoul(value)); });
  if (!given.empty()) throw std::runtime_error("unknown option " + given.begin()->first);
  if (options.target.empty() || options.method.empty() || options.payload.empty())
    throw std::runtime_error("--target, --method and --payload are needed");
  if ((options.concurrency > 0) == (options.rate > 0))
    throw std::runtime_error("one of --concurrency and --rate is needed, above 0");
  if (options.connections < 1) throw std::runtime_error("--connections must be at least 1");
  return options;
}

grpc::ByteBuffer Read(const std::string& path) {
  std::ifstream file(path, std::ios::binary);
  if (!file) throw std::runtime_error(path + ": cannot be read");
  std::string content{std::istreambuf_iterator<char>(file), {}};
  grpc::Slice slice(content);
  return {&slice, 1};
}

struct Call {
  grpc::ClientContext context;
  grpc::ByteBuffer response;
  grpc::Status status;
  std::unique_ptr<grpc::ClientAsyncResponseReader<grpc::ByteBuffer>> reader;
  Clock::time_point due;
};

struct Outcome {
  std::vector<double> milliseconds;  // of the calls that began after the warm-up
};

double CpuSeconds() {
  rusage usage{};
  getrusage(RUSAGE_SELF, &usage);
  auto seconds = [](const timeval& value) { return value.tv_sec + value.tv_usec / 1e6; };
  return seconds(usage.ru_utime) + seconds(usage.ru_stime);
}

double Percentile(const std::vector<double>& sorted, double share) {
  if (sorted.empty()) return 0;
  return sorted[std::min(sorted.size() - 1, static_cast<size_t>(share * static_cast<double>(sorted.size())))];
}

class Load {
 public:
  explicit Load(const Options& options) : options_(options), request_(Read(options.payload)), random_(options.seed) {
    for (int i = 0; i < options.connections; ++i) {
      grpc::ChannelArguments arguments;
      arguments.SetMaxReceiveMessageSize(-1);
      arguments.SetInt(GRPC_ARG_USE_LOCAL_SUBCHANNEL_POOL, 1);  // each channel has its own connection
      arguments.SetInt(GRPC_ARG_ENABLE_HTTP_PROXY, 0);
      arguments.SetLoadBalancingPolicyName("round_robin");  // one target can have several addresses
      auto channel = grpc::CreateCustomChannel(options.target, grpc::InsecureChannelCredentials(), arguments);
      if (!channel->WaitForConnected(std::chrono::system_clock::now() + std::chrono::seconds(20)))
        throw std::runtime_error(options.target + " does not answer");
      stubs_.push_back(std::make_unique<grpc::GenericStub>(channel));
    }
  }

  void Run() {
    start_ = Clock::now();
    counted_from_ = start_ + Since(options_.warmup);
    end_ = counted_from_ + Since(options_.seconds);
    if (options_.rate > 0)
      RunOpen();
    else
      RunClosed();
    Print();
  }

 private:
  static Clock::duration Since(double seconds) { return std::chrono::duration_cast<Clock::duration>(Seconds(seconds)); }

  void Begin(Clock::time_point due) {
    auto* call = new Call;
    call->due = due;
    if (options_.deadline_ms > 0)
      call->context.set_deadline(std::chrono::system_clock::now() +
                                 std::chrono::microseconds(static_cast<int64_t>(options_.deadline_ms * 1000)));
    auto& stub = stubs_[next_++ % stubs_.size()];
    call->reader = stub->PrepareUnaryCall(&call->context, options_.method, request_, &queue_);
    call->reader->StartCall();
    call->reader->Finish(&call->response, &call->status, call);
    ++in_flight_;
  }

  void End(void* tag) {
    std::unique_ptr<Call> call(static_cast<Call*>(tag));
    auto now = Clock::now();
    --in_flight_;
    if (!cpu_started_ && now >= counted_from_) {
      cpu_at_start_ = CpuSeconds();
      cpu_started_ = true;
    }
    if (call->status.ok()) {
      ++answered_;
      if (now >= counted_from_ && now < end_) ++answered_in_time_;
    }
    if (call->due < counted_from_ || call->due >= end_) return;
    if (options_.rate == 0 && now >= end_) return;  // a closed loop counts only calls that ended in time
    outcomes_[call->status.error_code()].milliseconds.push_back(Seconds(now - call->due).count() * 1000);
    if (call->status.ok()) bytes_ = std::max(bytes_, call->response.Length());
    if (!call->status.ok() && error_.empty()) error_ = call->status.error_message();
  }

  void RunClosed() {
    for (int i = 0; i < options_.concurrency; ++i) Begin(Clock::now());
    void* tag = nullptr;
    bool ok = false;
    while (in_flight_ > 0 && queue_.Next(&tag, &ok)) {
      End(tag);
      auto now = Clock::now();
      if (now < end_) Begin(now);
    }
  }

  void RunOpen() {
    std::exponential_distribution<double> gap(options_.rate);
    auto due = start_;
    void* tag = nullptr;
    bool ok = false;
    while (true) {
      auto now = Clock::now();
      while (due < end_ && due <= now) {
        Begin(due);
        due += Since(gap(random_));
      }
      if (due >= end_ && in_flight_ == 0) return;
      auto wait = due < end_ ? due - now : Clock::duration(std::chrono::seconds(1));
      auto until = std::chrono::system_clock::now() + std::chrono::duration_cast<std::chrono::microseconds>(wait);
      if (queue_.AsyncNext(&tag, &ok, until) == grpc::CompletionQueue::GOT_EVENT) End(tag);
    }
  }

  void Print() {
    double cpu = CpuSeconds() - cpu_at_start_;
    std::printf("{\"seconds\": %g, \"client_cpu_seconds\": %.3f, \"answered\": %zu, \"answered_in_time\": %zu, \"response_bytes\": %zu, \"codes\": {",
                options_.seconds, cpu, answered_, answered_in_time_, bytes_);
    const char* comma = "";
    for (auto& [code, outcome] : outcomes_) {
      auto& times = outcome.milliseconds;
      std::sort(times.begin(), times.end());
      double sum = 0;
      for (double each : times) sum += each;
      std::printf(
          "%s\"%d\": {\"count\": %zu, \"mean\": %.4f, \"p50\": %.4f, \"p90\": %.4f, \"p99\": %.4f, \"p999\": %.4f, "
          "\"max\": %.4f}",
          comma, code, times.size(), sum / static_cast<double>(times.size()), Percentile(times, 0.5),
          Percentile(times, 0.9), Percentile(times, 0.99), Percentile(times, 0.999), times.back());
      comma = ", ";
    }
    std::string clean;
    for (char each : error_) clean += (each == '"' || each == '\\' || each < ' ') ? ' ' : each;
    std::printf("}, \"first_error\": \"%s\"}\n", clean.c_str());
  }

  Options options_;
  grpc::ByteBuffer request_;
  std::mt19937_64 random_;
  std::vector<std::unique_ptr<grpc::GenericStub>> stubs_;
  grpc::CompletionQueue queue_;
  std::map<int, Outcome> outcomes_;
  std::string error_;
  Clock::time_point start_, counted_from_, end_;
  size_t next_ = 0, bytes_ = 0, answered_ = 0, answered_in_time_ = 0;
  int in_flight_ = 0;
  bool cpu_started_ = false;
  double cpu_at_start_ = 0;
};

}  // namespace

int main(int count, char** arguments) {
  try {
    Load(Parse(count, arguments)).Run();
  } catch (const std::exception& error) {
    std::fprintf(stderr, "load: %s\n", error.what());
    return 2;
  }
}
